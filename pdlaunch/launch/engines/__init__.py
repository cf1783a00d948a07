"""Kinds of engines: processes, proof of pairs, capabilities and rules of each kind."""
