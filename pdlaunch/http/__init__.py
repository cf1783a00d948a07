"""Serves HTTP: what routers and engines' servers share."""
