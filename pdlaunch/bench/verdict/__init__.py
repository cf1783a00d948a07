"""Measures whether disaggregation pays for a load on this machine, and in which split."""
