"""Whether tests over Mooncake can run here."""

import ctypes
import importlib.util


def mooncake_problem() -> str:
    """Return why Mooncake cannot be imported; empty where it can."""
    if importlib.util.find_spec("mooncake") is None:
        return "not installed"
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError as error:
        return str(error)
    return ""
