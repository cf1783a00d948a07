"""Clients of a running deployment, and ``pdlaunch serve`` as a child process."""
