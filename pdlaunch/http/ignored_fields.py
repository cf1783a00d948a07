"""Tells of the fields of requests that were ignored: in the log, and to the client in a header."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

IGNORED_FIELDS_HEADER = "X-Pdlaunch-Ignored-Fields"
"""Names of fields with commas between them."""
MAX_SENT_NAMES = 20
MAX_LOGGED_NAMES = 256
"""Names that a process logs in its life: what clients send must not fill its log or memory."""
MAX_NAME_CHARS = 64

# A name is the client's own text: only plain ones can go into a header.
_PLAIN_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_NAME_CHARS}}}")

_logger = logging.getLogger(__name__)


class IgnoredFields:
    """Remembers which names this process has logged."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def headers(self, names: Iterable[str]) -> dict[str, str]:
        """Log names that are new, and return the header that tells the client of all plain ones.

        Without such names there is no header.
        """
        plain: dict[str, None] = {}
        for name in names:
            self._log(name)
            if len(plain) < MAX_SENT_NAMES and _PLAIN_NAME.fullmatch(name):
                plain[name] = None
        return {IGNORED_FIELDS_HEADER: ", ".join(plain)} if plain else {}

    def _log(self, name: str) -> None:
        shown = ascii(name[:MAX_NAME_CHARS])
        if shown in self._logged or len(self._logged) >= MAX_LOGGED_NAMES:
            return
        self._logged.add(shown)
        _logger.warning("requests have a field that is not known here and ignored: %s", shown)
        if len(self._logged) == MAX_LOGGED_NAMES:
            _logger.warning("further names of ignored fields are not logged")


def read_ignored_fields(header: str | None) -> list[str]:
    """Return the names in an engine's header."""
    return [] if header is None else header.split(", ")
