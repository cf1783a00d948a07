"""Computes tokens: scheduler, model runner, step loop and rank process."""
