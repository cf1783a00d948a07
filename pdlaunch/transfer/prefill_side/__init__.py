"""Keeps leases on blocks, and answers the decode ranks that read them."""
