"""Machines on which processes of a launch run."""
