"""What every child process of the supervisor shares: bootstrap, parent guard, control channel."""
