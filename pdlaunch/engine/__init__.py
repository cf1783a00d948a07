"""Scheduler, model runner, step loop, rank process."""
