"""Finds out what this machine is: devices, driver, limits. Probes never raise."""
