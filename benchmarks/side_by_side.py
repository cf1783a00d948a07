"""Measures several ways to serve one model on one machine, one after the other, with equal loads.

``python -m benchmarks.side_by_side deploy.yaml --arms p2p,nixl,stock,aggregated`` starts
``pdlaunch serve deploy.yaml`` once for each arm and prints a row of JSON for each load: times in
milliseconds, medians over ``--repeats``. The arms ``stock...`` are vLLM's own connector behind
vllm-router, which has to be installed. ``--loads one,512,2048`` chooses the loads. Small
differences need ``--in-turns``: all arms run at once, and one is measured while the others idle.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.router_cost import held_ports, router_command, running
from pdlaunch.bench.loads import BenchOptions
from pdlaunch.bench.serve import BenchRow, bench_serve
from pdlaunch.launch.client.deployment import running_deployment

KEY = "benchmark"
ARMS: dict[str, dict[str, Any]] = {
    "p2p": {"kv_transfer": {"nixl": {"path": "p2p"}}},
    "p2p-unverified": {"kv_transfer": {"nixl": {"path": "p2p"}, "verify": False}},
    "p2p-cumem": {"kv_transfer": {"nixl": {"path": "p2p"}}, "enable_cumem_allocator": True},
    "nixl": {"kv_transfer": {"nixl": {"path": "nixl"}}},
    "nixl-unverified": {"kv_transfer": {"nixl": {"path": "nixl"}, "verify": False}},
    "pairs": {"routing": {"policy": "pairs"}},
    "load": {"routing": {"policy": "load"}},
    "stock": {"kv_transfer": {"connector": "vllm-nixl"}},
    "stock-cumem": {"kv_transfer": {"connector": "vllm-nixl"}, "enable_cumem_allocator": True},
    "prefill": {"both": {"replicas": 1}},
    "aggregated": {"both": {"replicas": 2}},
}
LOADS = {
    "one": {"input_tokens": [128, 4096, 8000], "output_tokens": 64, "concurrencies": [1]},
    "512": {"input_tokens": [512], "output_tokens": 256, "concurrencies": [32, 128]},
    "2048": {"input_tokens": [2048], "output_tokens": 256, "concurrencies": [8, 32]},
    # For a trial on a CPU
    "short": {"input_tokens": [64], "output_tokens": 8, "concurrencies": [1, 4]},
    # For the time to the first token, as of proven and unproven pulls
    "first": {"input_tokens": [128, 1024], "output_tokens": 4, "concurrencies": [1]},
}


@contextlib.contextmanager
def serving(config: Path, arm: str, logs: Path) -> Iterator[tuple[str, float]]:
    """Start an arm; yield its URL and the seconds that the start took."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        overlay, is_stock = ARMS[arm], arm.startswith("stock")
        prefill, decode, port, other = stack.enter_context(held_ports(4))
        if is_stock:
            ports = {"prefill": {"port": prefill}, "decode": {"port": decode}}
            overlay = {**overlay, **ports, "engine_api_key": KEY}
        variables = {**os.environ, **dict(settings_of(overlay))}
        deployment = stack.enter_context(
            running_deployment(
                [str(config)], environ=variables, log_dir=str(logs / arm), timeout_s=590
            )
        )
        if not is_stock:
            yield deployment.url, deployment.start_s
            return
        urls = [f"http://127.0.0.1:{number}" for number in (prefill, decode, port)]
        command = router_command("vllm-router", urls[0], urls[1], port=port, other=other)
        stack.enter_context(running(command, urls[2], folder / "router", OPENAI_API_KEY=KEY))
        yield urls[2], deployment.start_s


def settings_of(overlay: Mapping[str, Any], prefix: str = "PDLAUNCH") -> Iterator[tuple[str, str]]:
    """Yield the variables that set what an arm changes."""
    for name, value in overlay.items():
        joint = "_" if prefix == "PDLAUNCH" else "__"
        variable = f"{prefix}{joint}{name.upper()}"
        if isinstance(value, Mapping):
            yield from settings_of(value, variable)
        else:
            yield variable, str(value).lower() if isinstance(value, bool) else str(value)


async def measure(url: str, load: Mapping[str, Any], max_token_id: int) -> list[BenchRow]:
    options = BenchOptions(url=url, api_key=KEY, max_token_id=max_token_id, **load)
    return [run.row async for run in bench_serve(options, lambda _: None)]


def median_row(rows: list[BenchRow]) -> dict[str, Any]:
    """Return the medians of each figure of equal loads."""
    tables = [msgspec.to_builtins(row) for row in rows]
    return {
        name: statistics.median(table[name] for table in tables)
        for name, value in tables[0].items()
        if type(value) in (int, float) and all(table[name] is not None for table in tables)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--arms", default="p2p,nixl,stock,aggregated", help=",".join(ARMS))
    parser.add_argument("--loads", default="one,512,2048", help=",".join(LOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-token-id", type=int, default=30_000)
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="a folder for each arm")
    parser.add_argument("--in-turns", action="store_true", help="start all arms at once")
    given = parser.parse_args()
    arms = given.arms.split(",")
    for group in [arms] if given.in_turns else [[arm] for arm in arms]:
        with contextlib.ExitStack() as stack:
            started = {
                arm: stack.enter_context(serving(given.config, arm, given.logs)) for arm in group
            }
            for load in given.loads.split(","):
                turns = [
                    {
                        arm: asyncio.run(measure(url, LOADS[load], given.max_token_id))
                        for arm, (url, _) in started.items()
                    }
                    for _ in range(given.repeats)
                ]
                for arm, (_, start_s) in started.items():
                    for rows in zip(*(turn[arm] for turn in turns), strict=True):
                        row = {"arm": arm, "start_s": round(start_s, 1)} | median_row(list(rows))
                        sys.stdout.write(json.dumps(row) + "\n")
                        sys.stdout.flush()


if __name__ == "__main__":
    main()
