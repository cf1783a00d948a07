"""The rules behind check-config are pure functions over a resolved launch and what was probed."""
