"""Defines pdlaunch's form of the OpenAI API: request models and response structs."""
