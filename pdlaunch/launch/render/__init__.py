"""Renders a launch as Kubernetes objects; starts no processes and writes no files."""
