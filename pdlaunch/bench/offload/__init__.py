"""`pdlaunch bench offload`: block copies between device and host."""
