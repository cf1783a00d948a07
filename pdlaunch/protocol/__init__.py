"""Defines the messages between processes, and the JSON of the public API."""
