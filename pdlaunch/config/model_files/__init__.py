"""Reads the files of a model: where they are, whether they are whole, what shape it has."""
