"""Asks schedulers for room, and starts agents there: Ray, Slurm."""
