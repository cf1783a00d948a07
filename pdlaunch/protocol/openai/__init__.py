"""The OpenAI API as pdlaunch speaks it: request models, response structs, errors and server-sent
events.
"""
