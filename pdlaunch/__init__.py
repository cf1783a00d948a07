"""pdlaunch: launch disaggregated prefill/decode LLM serving with one command."""

__version__ = "0.1.0"
