"""Scheduler, model runner, step loop and rank process: what computes tokens."""
