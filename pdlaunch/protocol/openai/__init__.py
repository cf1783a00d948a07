"""Defines the OpenAI API as pdlaunch speaks it: request models and response structs."""
