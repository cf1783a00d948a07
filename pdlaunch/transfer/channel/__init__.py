"""The side channel between two ranks: sockets, handshake, and the mapping of KV heads."""
