"""Measures how long one client's short prompts wait while another client sends many long prompts.

``python -m benchmarks.fairness`` prints two rows of JSON: in the first the clients have different
keys, in the second they share a key, so that the router does not alternate between them. A row has
the milliseconds to the first token: median, 99th percentile and longest. The engines are simulated
(``plain_engine.py``); with ``--demo`` they are those of ``pdlaunch serve``, and get fewer prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import aiohttp

from benchmarks.router_cost import held_ports, quantiles_ms, router_command, running
from pdlaunch.bench.timed_completion import complete
from tests.e2e.client import running_deployment

OUTPUT_TOKENS = 8
_seeds = itertools.count()


@contextlib.contextmanager
def deployment(keys: Sequence[str], given: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Yield the URL of a router with these API keys."""
    entries = [{"name": key, "sha256": hashlib.sha256(key.encode()).hexdigest()} for key in {*keys}]
    file = folder / "deploy.json"
    file.write_text(json.dumps({"api_keys": entries, "routing": {"policy": "pairs"}}))
    with contextlib.ExitStack() as stack:
        if given.demo:
            yield stack.enter_context(running_deployment([str(file)])).url
            return
        prefill, decode, port, other = stack.enter_context(held_ports(4))
        urls = [f"http://127.0.0.1:{number}" for number in (prefill, decode, port)]
        engine = [sys.executable, "-m", "benchmarks.plain_engine", str(prefill), str(decode)]
        engine += ["0.01", str(given.tokens_per_s)]
        stack.enter_context(running(engine, urls[1], folder / "engines"))
        command = router_command("pdlaunch", urls[0], urls[1], port=port, other=other)
        command.insert(command.index("router") + 1, str(file))
        stack.enter_context(running(command, urls[2], folder / "router"))
        yield urls[2]


def prompts(number: int, num_tokens: int) -> list[list[int]]:
    """Return new random prompts; called before the time is measured."""
    ids = range(1000, 9000)
    return [random.Random(next(_seeds)).choices(ids, k=num_tokens) for _ in range(number)]


async def ask(session: aiohttp.ClientSession, model: str, prompt: list[int]) -> float:
    """Return the seconds to the first token."""
    done = await complete(session, model, prompt, OUTPUT_TOKENS)
    if done.error is not None:
        raise RuntimeError(done.error)
    return done.ttft_s


async def measure(url: str, keys: Sequence[str], given: argparse.Namespace) -> dict[str, object]:
    def session(key: str) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            url,
            headers={"Authorization": f"Bearer {key}"},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=3600),
        )

    async with session(keys[0]) as long, session(keys[1]) as short:
        async with long.get("/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        alone, beside = (prompts(given.num_short, given.short_tokens) for _ in range(2))
        long_s = [
            await ask(long, model, each) for each in prompts(given.num_alone, given.long_tokens)
        ]
        alone_s = [await ask(short, model, each) for each in alone]
        flood = prompts(given.num_long, given.long_tokens)
        works = [asyncio.ensure_future(ask(long, model, each)) for each in flood]
        await asyncio.sleep(given.ahead_s)
        beside_s: list[float] = []
        while len(beside_s) < given.num_short and not all(work.done() for work in works):
            beside_s.append(await ask(short, model, beside[len(beside_s)]))
        num_done = sum(work.done() for work in works)
        if not beside_s:
            raise RuntimeError("the long prompts ended first: raise --num-long")
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
    return {
        "long_alone_ms": round(1000 * statistics.median(long_s), 1),
        "short_alone_ms": quantiles_ms(alone_s),
        "short_beside_ms": (*quantiles_ms(beside_s), round(max(beside_s) * 1000, 1)),
        "num_short": len(beside_s),
        "num_long_done": num_done,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", action="store_true", help="native engines on this machine's CPU")
    parser.add_argument("--num-long", type=int)
    parser.add_argument("--long-tokens", type=int)
    parser.add_argument("--num-short", type=int)
    parser.add_argument("--short-tokens", type=int, default=100)
    parser.add_argument("--num-alone", type=int, help="long prompts in sequence, sent first")
    parser.add_argument("--ahead-s", type=float, default=2.0, help="head start of long prompts")
    parser.add_argument("--tokens-per-s", type=float, default=40_000, help="of simulated prefill")
    is_demo = parser.parse_known_args()[0].demo
    # A CPU computes a few hundred tokens/s, so there are few prompts. Long prompts exceed 2,048
    # tokens: the router may send two prompts at once if they have fewer together.
    few = {"num_long": 12, "long_tokens": 2_100, "num_short": 6, "num_alone": 3}
    many = {"num_long": 200, "long_tokens": 4_000, "num_short": 100, "num_alone": 10}
    parser.set_defaults(**(few if is_demo else many))
    given = parser.parse_args()
    os.environ["PDLAUNCH_LOG_LEVEL"] = "warning"
    for keys in (("a", "b"), ("a", "a")):
        with (
            tempfile.TemporaryDirectory() as folder,
            deployment(keys, given, Path(folder)) as url,
        ):
            row = asyncio.run(measure(url, keys, given))
        sys.stdout.write(json.dumps({"keys": len({*keys})} | row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
