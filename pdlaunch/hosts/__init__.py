"""Where processes of a launch run."""
