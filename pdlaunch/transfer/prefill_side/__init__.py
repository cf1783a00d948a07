"""Leases, and the answers to decode ranks that read leased blocks."""
