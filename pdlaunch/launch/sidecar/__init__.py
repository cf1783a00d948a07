"""Starts an engine of vLLM, monitors it over HTTP, and reports to the supervisor for it."""
