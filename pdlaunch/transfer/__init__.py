"""KV transfer between engines: connectors, side channel, handshake, lease, checksums."""
