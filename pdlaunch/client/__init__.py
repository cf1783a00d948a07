"""What talks to a running deployment."""
