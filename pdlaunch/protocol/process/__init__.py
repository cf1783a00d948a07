"""Implements the child's side of supervision: bootstrap, parent guard, control channel."""
