"""`pdlaunch bench serve` puts load on a running deployment, through its public API."""
