"""Kinds of engines: how each is planned, when it is ready, what it can do, what may be wrong."""
