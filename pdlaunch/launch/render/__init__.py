"""Renders a launch as objects of Kubernetes and docker compose; starts and writes nothing."""
