"""Drains engines of a running deployment, and gives them work again."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlencode

import msgspec

from pdlaunch.client.api import Api
from pdlaunch.client.commands import error_message
from pdlaunch.errors import PdlaunchError


class DrainOutcome(msgspec.Struct, frozen=True):
    """Tells what became of one engine."""

    engine: str
    running: int = 0
    """Requests that still ran there, and prompts whose KV blocks were still to be read."""
    notes: Sequence[str] = ()
    error: str | None = None
    """None: it is drained, or is given work again."""


def drain_engines(admin: Api, names: Sequence[str], *, timeout_s: float) -> list[DrainOutcome]:
    """Give engines no new work; return when nothing runs there, at the latest after ``timeout_s``.

    Raises PdlaunchError when the command is refused.
    """
    return _command(admin, "drain", [("timeout_s", f"{timeout_s:g}")], names)


def undrain_engines(admin: Api, names: Sequence[str]) -> list[DrainOutcome]:
    """Give drained engines work again. Raises PdlaunchError when the command is refused."""
    return _command(admin, "undrain", [], names)


def _command(
    admin: Api, verb: str, query: list[tuple[str, str]], names: Sequence[str]
) -> list[DrainOutcome]:
    pairs = [*query, *(("engine", name) for name in names)]
    status, answer = admin.post(f"/pdlaunch/{verb}?{urlencode(pairs)}", {})
    if "engines" not in answer:
        raise PdlaunchError(f"{verb} was refused: {error_message(answer) or f'HTTP {status}'}")
    return [
        DrainOutcome(
            each["engine"],
            each.get("running", 0),
            each.get("notes", ()),
            (error_message(each) or "it does not say why") if "error" in each else None,
        )
        for each in answer["engines"]
    ]
