"""What two ranks say to each other: the side channel, the handshake, which heads go where."""
