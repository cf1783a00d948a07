"""Renders a launch as objects of Kubernetes; starts and writes nothing."""
