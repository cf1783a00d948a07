"""Plan, spawn, watch, stop; the registry."""
