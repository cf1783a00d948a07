"""Calls a C library that answers with an error code, through ctypes."""

from __future__ import annotations

import ctypes
from typing import ClassVar


class LibraryCalls:
    """Turns an error code into an exception that names the call."""

    error: ClassVar[type[Exception]]
    owner: ClassVar[str]
    """The library's name, for people."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __call__(self, name: str, *arguments: object) -> None:
        try:
            code = int(getattr(self._library, name)(*arguments))
        except AttributeError:
            raise self.error(f"{self.owner} has no {name}: the driver is too old") from None
        if code:
            raise self.error(f"{name} failed: {self._error_name(code)}")

    def _error_name(self, code: int) -> str:
        return f"error {code}"
