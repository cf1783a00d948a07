"""Measures whether a load gains from disaggregation on this machine, and which split is best."""
