"""`pdlaunch bench offload` times block copies between device and host."""
