"""Asks a deployment's engines who owns each KV block, and what was counted."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import Api

MUST_BE_ZERO = (
    "num_running",
    "num_waiting",
    "num_waiting_for_kv",
    "num_leased_requests",
    "num_leased_blocks",
    "num_quarantined_blocks",
)
_VLLM_MUST_BE_ZERO = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
)
"""Metrics of an engine of vLLM, which proves no blocks; those under lease count as used."""
_POLL_S = 0.2


def engines_of(router: Api) -> list[dict[str, Any]]:
    """Return name, role, kind and state of each engine behind a router that was not given up."""
    status, answer = router.get_object("/pdlaunch/status")
    if status != 200:
        raise PdlaunchError(f"{router.url} does not tell its engines: HTTP {status}: {answer}")
    return [engine for engine in answer["engines"] if engine["state"] != "failed"]


def await_idle(admin: Api, *, timeout_s: float) -> list[str]:
    """Wait until no engine holds anything; return what is left, or wrong, after ``timeout_s``."""
    deadline_at = time.monotonic() + timeout_s
    while True:
        try:
            left = _left(admin)
        except PdlaunchError as error:
            left = [str(error)]
        if not left or time.monotonic() > deadline_at:
            return left
        time.sleep(_POLL_S)


def engine_totals(admin: Api) -> dict[str, float]:
    """Return the counters of the engines that live, summed, and those of the router."""
    totals: dict[str, float] = {}
    for report in _reports(admin):
        for name, value in report.get("stats", {}).items():
            # Those are counts of an instant, which do not add up over time.
            if not name.startswith("num_") and isinstance(value, int | float):
                totals[name] = round(totals.get(name, 0) + value, 3)
    for family in text_string_to_metric_families(admin.get("/metrics")[1]):
        if family.name.startswith("pdlaunch_router_") and family.type == "counter":
            values = (each.value for each in family.samples if each.name.endswith("_total"))
            totals[family.name.removeprefix("pdlaunch_")] = sum(values)
    return totals


def _left(admin: Api) -> list[str]:
    of_vllm = {engine["name"] for engine in engines_of(admin) if engine.get("kind") == "vllm"}
    left = [
        f"{name}: {metric} is {value:g}"
        for name in of_vllm
        for metric in _VLLM_MUST_BE_ZERO
        if (value := admin.engine(name).metrics()[metric])
    ]
    for report in _reports(admin):
        engine = report["engine"]
        if engine in of_vllm:
            continue
        if not report.get("ok"):
            left.append(f"{engine}: {report.get('error')}")
            continue
        stats = report["stats"]
        left += [f"{engine}: {name} is {stats[name]}" for name in MUST_BE_ZERO if stats[name]]
        free, total = stats["num_free_blocks"], stats["num_blocks"]
        if free != total:
            left.append(f"{engine}: {free} of {total} blocks are free")
    return left


def _reports(admin: Api) -> list[dict[str, Any]]:
    """Return the integrity check of each engine that was not given up. Raises PdlaunchError."""
    status, answer = admin.get_object("/pdlaunch/integrity")
    if "engines" not in answer:
        raise PdlaunchError(f"the router does not tell its engines: HTTP {status}: {answer}")
    reports: list[dict[str, Any]] = answer["engines"]
    return reports
