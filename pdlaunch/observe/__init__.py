"""Logging, metrics, trace context."""
