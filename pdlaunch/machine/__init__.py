"""Collects facts about this machine: devices, driver, limits. Probes never raise."""
