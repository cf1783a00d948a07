"""Defines the messages between processes, and the wire forms of the public API."""
