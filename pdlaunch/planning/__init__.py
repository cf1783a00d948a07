"""Derives a resolved launch from settings, machines and shapes of models."""
