"""Deployments of tiny models with faulty transfers, and helpers to stop and kill processes."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.agreement import await_idle
from tests.e2e.client import Api, Deployment, admin_api
from tests.e2e.conftest import clean_environ, launched
from tests.e2e.waiting import await_true

ROOT = Path(__file__).parents[2]
SHORT_DEADLINES = {
    "PDLAUNCH_KV_TRANSFER__LEASE_S": "3",
    "PDLAUNCH_KV_TRANSFER__PULL_TIMEOUT_S": "1.5",
}


def fault_variables(faults: Mapping[str, Any]) -> dict[str, str]:
    """The environment of a launch with injected faults; ``faults``: fields of ``FaultPlan``."""
    paths = (ROOT / "tests" / "faulty" / "hook", ROOT, os.environ.get("PYTHONPATH", ""))
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, map(str, paths))),
        "INJECTED_FAULTS": json.dumps(faults),
    }


@contextmanager
def faulty_deployment(
    model: Path,
    faults: Mapping[str, Any] | None,
    *arguments: str,
    environ: Mapping[str, str] = SHORT_DEADLINES,
) -> Iterator[Deployment]:
    """One prefill and one decode engine; ``faults``: fields of ``FaultPlan``."""
    plan = {} if faults is None else fault_variables(faults)
    # Prompts take several steps, so that faults also hit chunked prefills.
    chunks = {"PDLAUNCH_MAX_NUM_BATCHED_TOKENS": "96"}
    environ = clean_environ() | chunks | dict(environ) | plan
    with launched(model, "--kv-cache-memory", "2MiB", *arguments, environ=environ) as deployment:
        yield deployment


@contextmanager
def paused(process: psutil.Process) -> Iterator[None]:
    try:
        stop(process)
        yield
    finally:
        process.resume()


def stop(process: psutil.Process) -> None:
    """Stop a process with SIGSTOP, and wait until it has stopped."""
    process.suspend()
    # Threads run on until the thread that got the signal is scheduled.
    await_true(lambda: process.status() == psutil.STATUS_STOPPED, "the process is stopped")


def lives(process: psutil.Process) -> bool:
    """True if the process runs. A process that init inherits may be a zombie for a while."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tracebacks(deployment: Deployment) -> dict[str, int]:
    """Log file -> number of tracebacks; expected deaths and restarts have none, only a line."""
    counts = {
        path.name: path.read_text(errors="replace").count("Traceback")
        for path in deployment.log_dir.iterdir()
    }
    return {name: count for name, count in counts.items() if count}


def left_over(deployment: Deployment) -> list[str]:
    """Requests and blocks that engines still hold after all requests have ended."""
    return await_idle(admin_api(deployment.url), timeout_s=180)


def num_migrations(deployment: Deployment) -> float:
    return Api(deployment.url).metrics()["pdlaunch_router_migrations_total"]
