"""The books of a deployment's engines: who owns each KV block, and what was counted."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.errors import PdlaunchError

MUST_BE_ZERO = (
    "num_running",
    "num_waiting",
    "num_waiting_for_kv",
    "num_leased_requests",
    "num_leased_blocks",
    "num_quarantined_blocks",
)
_POLL_S = 0.2


async def engine_urls(session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> dict[str, list[str]]:
    """By role, the engines behind a router that were not given up. Raises PdlaunchError."""
    async with session.get(url + "/pdlaunch/status", headers=headers) as response:
        if response.status != 200:
            raise PdlaunchError(f"{url} does not tell its engines: HTTP {response.status}")
        urls: dict[str, list[str]] = {"prefill": [], "decode": []}
        for engine in (await response.json())["engines"]:
            if engine["state"] != "failed":
                urls[engine["role"]].append(engine["url"])
        return urls


async def await_idle(session: aiohttp.ClientSession, url: str, headers: dict[str, str], *, timeout_s: float) -> list[str]:
    """Wait until every engine holds nothing any more; returns what is left, or wrong with its books, after ``timeout_s``."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        left = await _left(session, url, headers)
        if not left or time.monotonic() > deadline_s:
            return left
        await asyncio.sleep(_POLL_S)


async def engine_totals(session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> dict[str, float]:
    """Counters of ``EngineStats``, summed over the engines that live now, and those of the router."""
    totals: dict[str, float] = {}
    for report in (await _reports(session, url, headers)).values():
        for name, value in report.get("stats", {}).items():
            if not name.startswith("num_"):
                totals[name] = round(totals.get(name, 0) + value, 3)
    async with session.get(url + "/metrics", headers=headers) as response:
        for family in text_string_to_metric_families(await response.text()):
            if family.name.startswith("pdlaunch_router_") and family.type == "counter":
                name = family.name.removeprefix("pdlaunch_")
                totals[name] = sum(sample.value for sample in family.samples if sample.name.endswith("_total"))
    return totals


async def _left(session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> list[str]:
    left = []
    for engine, report in (await _reports(session, url, headers)).items():
        if not report.get("ok"):
            left.append(f"{engine}: {report.get('error')}")
            continue
        stats = report["stats"]
        left += [f"{engine}: {name} is {stats[name]}" for name in MUST_BE_ZERO if stats[name]]
        if stats["num_free_blocks"] != stats["num_blocks"]:
            left.append(f"{engine}: {stats['num_free_blocks']} of {stats['num_blocks']} blocks are free")
    return left


async def _reports(session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> dict[str, dict[str, Any]]:
    """By URL, what ``/pdlaunch/integrity`` says; an engine that cannot be asked is one that is not ok."""
    reports: dict[str, dict[str, Any]] = {}
    urls = await engine_urls(session, url, headers)
    for engine in urls["prefill"] + urls["decode"]:
        try:
            async with session.get(engine + "/pdlaunch/integrity") as response:
                reports[engine] = await response.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            reports[engine] = {"ok": False, "error": repr(error)}
    return reports
