"""Implements a child process's side of supervision: bootstrap, parent guard, control channel."""
