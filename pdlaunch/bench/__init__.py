"""Measurements behind `pdlaunch bench`."""
