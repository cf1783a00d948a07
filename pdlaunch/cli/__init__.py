"""Typer and rich; the only room that renders."""
