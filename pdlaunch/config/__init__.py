"""Holds settings: the models that declare them, the sources of their values, what a model's files
say.
"""
