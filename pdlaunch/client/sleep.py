"""Put the engines of a running deployment to sleep and wake them up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from pdlaunch.client.api import Api, check_url
from pdlaunch.client.smoke import engines_of
from pdlaunch.errors import PdlaunchError

CALL_TIMEOUT_S = 900.0
"""Longer than an engine waits for what runs."""
ROUTER_TIMEOUT_S = 10.0
ROUTER_POLL_S = 0.02


class SleepOutcome(msgspec.Struct, frozen=True):
    """What one engine has answered."""

    engine: str
    is_sleeping: bool
    num_bytes: int = 0
    """Device memory given back or taken."""
    error: str | None = None


def sleep_engines(url: str, api_key: str | None, *, level: int, mode: str, names: Sequence[str] = ()) -> list[SleepOutcome]:
    """Prefill engines first: what they hold for decode engines is fetched while those are awake. Raises PdlaunchError."""
    engines = _engines(url, api_key, names, first="prefill")
    return [_call(engine, f"/sleep?level={level}&mode={mode}") for engine in engines]


def wake_engines(url: str, api_key: str | None, *, tags: Sequence[str] = (), names: Sequence[str] = ()) -> list[SleepOutcome]:
    """Decode engines first: they shake hands with prefill engines as these come back. ``tags``: none are all."""
    query = f"?tags={','.join(tags)}" if tags else ""
    outcomes = [_call(engine, f"/wake_up{query}") for engine in _engines(url, api_key, names, first="decode")]
    _await_router(Api(url, api_key), {outcome.engine for outcome in outcomes if not (outcome.is_sleeping or outcome.error)})
    return outcomes


def _await_router(router: Api, awake: set[str]) -> None:
    """The router hears of it a moment later than we do: requests that follow shall find these engines."""
    deadline_s = time.monotonic() + ROUTER_TIMEOUT_S
    while any(engine["name"] in awake and engine["state"] == "sleeping" for engine in engines_of(router)):
        if time.monotonic() > deadline_s:
            raise PdlaunchError(f"{router.url} does not see within {ROUTER_TIMEOUT_S:g} s that its engines are awake")
        time.sleep(ROUTER_POLL_S)


def _engines(url: str, api_key: str | None, names: Sequence[str], first: Literal["prefill", "decode"]) -> list[dict[str, Any]]:
    check_url(url)
    engines = {engine["name"]: engine for engine in engines_of(Api(url, api_key))}
    if unknown := [name for name in names if name not in engines]:
        raise PdlaunchError(f"{url} has no engine {unknown[0]}; there are {', '.join(sorted(engines))}")
    wanted = [engine for name, engine in engines.items() if not names or name in names]
    return sorted(wanted, key=lambda engine: (engine["role"] != first, engine["name"]))


def _call(engine: dict[str, Any], path: str) -> SleepOutcome:
    status, answer = Api(engine["url"], timeout_s=CALL_TIMEOUT_S).post(path, {})
    if status != 200:
        return SleepOutcome(engine["name"], engine["state"] == "sleeping", error=answer["error"]["message"])
    return SleepOutcome(engine["name"], answer["is_sleeping"], answer["num_bytes"])
