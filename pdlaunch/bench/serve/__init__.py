"""`pdlaunch bench serve`: load on a running deployment, through its public API."""
