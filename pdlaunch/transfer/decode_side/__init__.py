"""Pulls: what a decode rank reads from each prefill rank, and the proof of it."""
