"""Runs a launch: plan, spawn, watch, stop."""
