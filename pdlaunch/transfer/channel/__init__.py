"""Connects two ranks: sockets of the side channel, the handshake, and the mapping of KV heads."""
