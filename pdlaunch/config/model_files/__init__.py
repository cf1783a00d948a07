"""What the files of a model say: where they are, whether they are whole, what shape it has."""
