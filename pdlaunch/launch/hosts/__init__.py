"""Hosts on which the processes of a launch run: local, or with an agent."""
