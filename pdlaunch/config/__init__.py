"""Settings: the models that declare them, the sources of their values, facts from model files."""
