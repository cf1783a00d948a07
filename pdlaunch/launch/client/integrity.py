"""Asks a deployment's engines for their integrity check: who owns each KV block, and what was
counted.
"""

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
VLLM_MUST_BE_ZERO = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
)
"""Metrics of an engine of vLLM, which proves no blocks; those under lease count as used."""
_POLL_S = 0.2


def await_idle(admin: Api, *, timeout_s: float) -> list[str]:
    """Wait until every engine holds nothing any more.

    Returns what is left, or wrong, after ``timeout_s``; empty when all is well.
    """
    deadline_at = time.monotonic() + timeout_s
    while True:
        left = _left(admin)
        if not left or time.monotonic() > deadline_at:
            return left
        time.sleep(_POLL_S)


def engine_totals(admin: Api) -> dict[str, float]:
    """Return the counters of ``EngineStats``, summed over the engines that live now, and those of
    the router.
    """
    totals: dict[str, float] = {}
    for report in _reports(admin):
        for name, value in report.get("stats", {}).items():
            # Those are counts of an instant, which do not add up over time.
            if not name.startswith("num_") and value is not None:
                totals[name] = round(totals.get(name, 0) + value, 3)
    for family in text_string_to_metric_families(admin.get("/metrics")[1]):
        if family.name.startswith("pdlaunch_router_") and family.type == "counter":
            name = family.name.removeprefix("pdlaunch_")
            totals[name] = sum(
                sample.value for sample in family.samples if sample.name.endswith("_total")
            )
    return totals


def _left(admin: Api) -> list[str]:
    try:
        reports = _reports(admin)
        of_vllm = _of_vllm(admin)
        left = [
            f"{name}: {metric} is {value:g}"
            for name in of_vllm
            for metric in VLLM_MUST_BE_ZERO
            if (value := admin.engine(name).metrics()[metric])
        ]
    except PdlaunchError as error:
        return [str(error)]
    for report in reports:
        engine = report["engine"]
        if engine in of_vllm:
            continue
        if not report.get("ok"):
            left.append(f"{engine}: {report.get('error')}")
            continue
        stats = report["stats"]
        left += [f"{engine}: {name} is {stats[name]}" for name in MUST_BE_ZERO if stats[name]]
        if stats["num_free_blocks"] != stats["num_blocks"]:
            left.append(
                f"{engine}: {stats['num_free_blocks']} of {stats['num_blocks']} blocks are free"
            )
    return left


def _of_vllm(admin: Api) -> list[str]:
    """Return the names of the engines of vLLM that live. Raises PdlaunchError."""
    _, status = admin.get_object("/pdlaunch/status")
    return [
        engine["name"]
        for engine in status.get("engines", ())
        if engine.get("kind") == "vllm" and engine["state"] != "failed"
    ]


def _reports(admin: Api) -> list[dict[str, Any]]:
    """Ask for the integrity check of each engine that was not given up. Raises PdlaunchError."""
    status, answer = admin.get_object("/pdlaunch/integrity")
    if "engines" not in answer:
        raise PdlaunchError(f"the router does not tell its engines: HTTP {status}: {answer}")
    reports: list[dict[str, Any]] = answer["engines"]
    return reports
