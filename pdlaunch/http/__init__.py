"""The room of what routers and engines' servers share: it decides who may speak to them, and how
much.
"""
