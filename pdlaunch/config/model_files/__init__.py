"""Finds and checks the files of a model, and reads the model's shape."""
