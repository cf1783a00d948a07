"""Turns settings, machines and shapes of models into a resolved launch; nothing else derives."""
