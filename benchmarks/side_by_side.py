"""Compares several ways ("arms") to serve one model on one machine, with equal loads.

``python -m benchmarks.side_by_side deploy.yaml --arms p2p,nixl,stock,aggregated`` starts
``pdlaunch serve deploy.yaml`` once for each arm and prints a row of JSON for each load: times in
milliseconds, medians over ``--repeats``. The arms ``stock...`` use vLLM's own connector behind
vllm-router, which has to be installed. ``--loads one,512,2048`` chooses the loads. Small
differences need ``--in-turns``: all arms run at once, and one is measured while the others idle.

If an arm has a prefill and a decode engine, ``one`` and ``first`` also send prompts to the engines
directly: ``decode_ms`` is the time from the request to decode until its first token, ``cached_ms``
the same for a prompt whose KV blocks decode has.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec

from benchmarks.router_cost import held_ports, router_command, running
from pdlaunch.bench.serve import BenchOptions, BenchRow, bench_serve
from tests.e2e.client import running_deployment

KEY = "benchmark"
ARMS: dict[str, dict[str, Any]] = {
    "p2p": {"kv_transfer": {"nixl": {"path": "p2p"}}},
    "p2p-pairs": {"kv_transfer": {"nixl": {"path": "p2p"}}, "routing": {"policy": "pairs"}},
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
    # For two CPU cores
    "short": {"input_tokens": [128], "output_tokens": 32, "concurrencies": [1]},
    # For comparing times to the first token, such as those of verified and unverified pulls
    "first": {"input_tokens": [128, 1024], "output_tokens": 4, "concurrencies": [1]},
}


class Served(NamedTuple):
    """A running arm."""

    url: str
    start_s: float
    engines: tuple[str, str] | None  # URLs of prefill and decode


@contextlib.contextmanager
def serving(config: Path, arm: str, logs: Path) -> Iterator[Served]:
    """Start an arm and wait until it is ready."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        overlay, is_stock = ARMS[arm], arm.startswith("stock")
        prefill, decode, port, other = stack.enter_context(held_ports(4))
        urls = [f"http://127.0.0.1:{number}" for number in (prefill, decode, port)]
        engines = None if "both" in overlay else (urls[0], urls[1])
        if engines:
            ports = {"prefill": {"port": prefill}, "decode": {"port": decode}}
            overlay = {**overlay, **ports, "engine_api_key": KEY}
        variables = {**os.environ, **dict(settings_of(overlay))}
        deployment = stack.enter_context(
            running_deployment(
                [str(config)], environ=variables, log_dir=str(logs / arm), timeout_s=590
            )
        )
        if not is_stock:
            yield Served(deployment.url, deployment.start_s, engines)
            return
        command = router_command("vllm-router", urls[0], urls[1], port=port, other=other)
        stack.enter_context(running(command, urls[2], folder / "router", OPENAI_API_KEY=KEY))
        yield Served(urls[2], deployment.start_s, engines)


def settings_of(overlay: Mapping[str, Any], prefix: str = "PDLAUNCH") -> Iterator[tuple[str, str]]:
    """Yield the environment variables for the settings of an arm."""
    for name, value in overlay.items():
        joint = "_" if prefix == "PDLAUNCH" else "__"
        variable = f"{prefix}{joint}{name.upper()}"
        if isinstance(value, Mapping):
            yield from settings_of(value, variable)
        else:
            yield variable, str(value).lower() if isinstance(value, bool) else str(value)


async def measure(url: str, load: Mapping[str, Any], given: argparse.Namespace) -> list[BenchRow]:
    rows = []
    for number in load["concurrencies"]:
        options = BenchOptions(
            url=url,
            api_key=KEY,
            max_token_id=given.max_token_id,
            **{**load, "concurrencies": [number]},
            num_requests=max(8, given.rounds * number),
        )
        rows += [run.row async for run in bench_serve(options, lambda _: None)]
    return rows


async def first_tokens(engines: tuple[str, str], num_tokens: int, max_id: int) -> dict[str, float]:
    """Return the medians of 8 prompts in milliseconds: until prefill's and decode's first bytes."""
    times_s: dict[str, list[float]] = {"prefill_ms": [], "decode_ms": [], "cached_ms": []}
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session:
        async with session.get(f"{engines[1]}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]

        async def ask(url: str, name: str, **fields: Any) -> Any:
            data, start_at = msgspec.json.encode(body | fields), time.perf_counter()
            headers = {"Content-Type": "application/json"}
            async with session.post(url + "/v1/completions", data=data, headers=headers) as answer:
                answer.raise_for_status()
                first = await anext(answer.content.iter_any())
                times_s[name].append(time.perf_counter() - start_at)
                return first + await answer.read()

        for _ in range(9):
            prompt = random.choices(range(1000, max_id), k=num_tokens)
            body = {"model": model, "prompt": prompt, "temperature": 0, "ignore_eos": True}
            wanted = {"do_remote_decode": True, "do_remote_prefill": False}
            answer = await ask(engines[0], "prefill_ms", max_tokens=1, kv_transfer_params=wanted)
            params = msgspec.json.decode(answer)["kv_transfer_params"]
            streamed = {"max_tokens": 8, "stream": True}
            await ask(engines[1], "decode_ms", kv_transfer_params=params, **streamed)
            await ask(engines[1], "cached_ms", **streamed)
    # The first prompt warms up.
    return {name: round(statistics.median(all_s[1:]) * 1000, 1) for name, all_s in times_s.items()}


def median_row(rows: list[BenchRow]) -> dict[str, Any]:
    """Return the median of each figure over equal loads."""
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
    parser.add_argument(
        "--rounds", type=int, default=4, help="requests for each client, at least 8 in all"
    )
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
                        arm: asyncio.run(measure(served.url, LOADS[load], given))
                        for arm, served in started.items()
                    }
                    for _ in range(given.repeats)
                ]
                for arm, served in started.items():
                    for rows in zip(*(turn[arm] for turn in turns), strict=True):
                        row = {"arm": arm, "start_s": round(served.start_s, 1)}
                        row |= median_row(list(rows))
                        if load in ("one", "first") and served.engines:
                            tokens = int(row["input_tokens"])
                            one = first_tokens(served.engines, tokens, given.max_token_id)
                            row |= asyncio.run(one)
                        sys.stdout.write(json.dumps(row) + "\n")
                        sys.stdout.flush()


if __name__ == "__main__":
    main()
