"""The rules behind check-config: pure functions over config and a probed environment."""
