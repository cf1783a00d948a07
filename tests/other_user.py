"""Runs a function as another user of this machine, which only root can."""

import encodings.idna  # noqa: F401 - sockets need it, and another user cannot import it
import os
from collections.abc import Callable

import msgspec

NOBODY = 65534


def as_nobody(act: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Run ``act`` in a process of another user; return its result."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            answer = act()
        except BaseException as error:
            answer = {"failed": repr(error)}
        finally:
            os.write(writing, msgspec.json.encode(answer))
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return msgspec.json.decode(answer, type=dict[str, str])
