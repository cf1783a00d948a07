"""Attacks on a deployment as a stranger or a careless client would make them: ``python -m
tests.attacks --help``.
"""
