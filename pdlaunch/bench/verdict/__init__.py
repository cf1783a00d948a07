"""Finds out by measurement whether disaggregation pays for a load on this machine, and how."""
