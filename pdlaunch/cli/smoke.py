"""``pdlaunch smoke``: start a deployment, check what it promises, stop it, print a verdict.

The same prompts go through the public router (prefill and decode), through each engine of both
roles, and through one engine alone. In float32 the tokens must be equal; in other dtypes the
log-probabilities of the common prefix, and of the first token that differs, must lie within
``SMOKE_LOGPROB_TOLERANCE``.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Collection, Generator, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import psutil
import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.api import launched
from pdlaunch.cli import EXIT_INTERRUPTED
from pdlaunch.cli.flags import refuse_address, with_serve_flags
from pdlaunch.cli.output import ending_at_errors, print_errors, safe
from pdlaunch.config.sources import LoadedConfig, load_config
from pdlaunch.errors import PdlaunchError
from pdlaunch.http.headers import ROUTE_HEADER, WANTS_PAIR
from pdlaunch.http.watch.canary import BYTES_READ
from pdlaunch.launch.client.admin import admin_api, error_message
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment
from pdlaunch.machine.probe import probe_machine
from pdlaunch.planning.resolve import THIS_HOST, resolve

SMOKE_LOGPROB_TOLERANCE = 0.25
"""Tolerance in nats. bfloat16 keeps 8 bits: sums in another order move a log-probability by a few
hundredths, rarely by a tenth.
"""
NUM_TOKENS = 12
_IDLE_TIMEOUT_S = 20.0
_PROMPTS = (
    "Hello",
    "The capital of France is",
    "Water boils at one hundred degrees, and freezes at",
    "In the beginning there was a small machine that wanted to learn how to count. It began with "
    "one, then two, then",
    "List of prime numbers: 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, "
    "67, 71, 73, 79, 83, 89,",
)
_LONG_PROMPT = " ".join(f"{number} and {number + 1} make {2 * number + 1}." for number in range(40))
"""vLLM leaves a prompt of less than 64 tokens to decode, and computes the last block there."""


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


class Check(msgspec.Struct, frozen=True):
    """Holds one check of a smoke run; ``failure`` is None when it held."""

    name: str
    seconds: float
    failure: str | None = None


@with_serve_flags
def smoke_command(config: Path | None = None, *, flags: dict[str, object]) -> None:
    """Start the deployment, compare its tokens with those of one engine alone, stop it.

    The exit code is 1 when a check failed.
    """
    refuse_address(flags)
    with ending_at_errors():
        loaded = load_config(config, os.environ, flags)
    checks: list[Check] = []
    try:
        with contextlib.closing(_run(loaded)) as run:
            for check in run:
                checks.append(check)
                _print_check(check)
    except PdlaunchError as error:
        done = "can be checked" if checks else "gets ready"
        checks.append(Check(f"the deployment {done}", 0.0, str(error)))
        _print_check(checks[-1])
    except KeyboardInterrupt:
        print_errors(["interrupted"])
        raise typer.Exit(EXIT_INTERRUPTED) from None
    num_failed = sum(check.failure is not None for check in checks)
    verdict = f"{num_failed} of {len(checks)} checks failed"
    Console().print(Text(f"smoke: {verdict if num_failed else f'{len(checks)} checks passed'}"))
    raise typer.Exit(int(num_failed > 0))


def _run(loaded: LoadedConfig) -> Generator[Check]:
    """Yield each check when it is done. Raises PdlaunchError."""
    key = loaded.config.api_key
    api_key = None if key is None else key.get_secret_value()
    with launched(loaded) as deployment:
        yield Check("the deployment gets ready", round(deployment.start_s, 3))
        # Known before the stop, to see afterwards whether one of them is left.
        children = psutil.Process(deployment.process.pid).children(recursive=True)
        # Only now: a model that had to be converted can be read.
        roles = resolve(loaded.config, {THIS_HOST: probe_machine()}, os.environ).roles.values()
        exact = {engines.dtype for engines in roles} == {"float32"}
        yield from smoke(deployment.url, api_key=api_key, exact=exact)
        yield _stop(deployment, children)


def _stop(deployment: Deployment, children: list[psutil.Process]) -> Check:
    """Check that SIGTERM ends the deployment with code 0 and leaves no process."""
    start_at = time.monotonic()
    try:
        code = deployment.stop()
        left = [
            str(child)
            for child in children
            if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
        ]
        failure = f"exit code {code}" if code else f"still running: {left}" if left else None
    except PdlaunchError as error:
        failure = str(error)
    seconds = round(time.monotonic() - start_at, 3)
    return Check("the deployment stops and leaves no process", seconds, failure)


def _print_check(check: Check) -> None:
    """Print a line for the check, and why it failed."""
    console = Console(soft_wrap=True)
    mark, style = ("ok", "green") if check.failure is None else ("FAILED", "bold red")
    console.print(Text.assemble((f"{mark:>6}", style), f"  {check.name} ({check.seconds:.1f} s)"))
    if check.failure is not None:
        console.print(Text(safe(f"        {check.failure}")))


def smoke(url: str, *, api_key: str | None = None, exact: bool) -> list[Check]:
    """Run all checks against a running launch of this user. ``exact``: it computes in float32."""
    # Pairs are what is to be proven, however little a prompt alone would cost.
    router, admin = Api(url, api_key, headers={ROUTE_HEADER: WANTS_PAIR}), admin_api(url)
    engines = engines_of(admin)
    decode, prefill, both = (
        {each["name"]: admin.engine(each["name"]) for each in engines if each["role"] == role}
        for role in ("decode", "prefill", "both")
    )
    if not (decode or prefill or both):
        return [Check("the deployment has engines", 0.0, "it lists none that lives")]
    # One engine alone moves no KV blocks: its answers are the reference.
    alone_name, alone = next(iter((decode | prefill | both).items()))
    kind = engines[0].get("kind", "native")
    prompts = (*_PROMPTS, _LONG_PROMPT) if kind == "vllm" else _PROMPTS
    pulled_before = _pulled_bytes(decode.values())
    asked = {"prefill/decode" if prefill and decode else "the router": router}
    # The router prefers pairs, so engines of both roles are asked themselves.
    asked |= {name: engine for name, engine in both.items() if name != alone_name}
    checks = [
        _check(
            f"{name} equals one engine alone, prompt {index}",
            partial(_compare, api, alone, prompt, exact=exact),
        )
        for name, api in asked.items()
        for index, prompt in enumerate(prompts)
    ]
    checks.append(_check("streamed text equals the whole answer", partial(_compare_stream, router)))
    if prefill and decode:
        moved = partial(_moved, decode.values(), pulled_before)
        checks.append(_check("KV bytes moved from prefill to decode", moved))
    checks.append(_check("nothing is left running, leased or quarantined", partial(_idle, admin)))
    return checks


def _check(name: str, run: Callable[[], None]) -> Check:
    start_at = time.monotonic()
    failure = None
    try:
        run()
    except (PdlaunchError, KeyError, ValueError) as error:
        failure = str(error) or repr(error)
    return Check(name, round(time.monotonic() - start_at, 3), failure)


def _compare(asked: Api, engine: Api, prompt: str, *, exact: bool) -> None:
    """Send ``prompt`` twice to what is judged (the second time from prefix caches) and once to an
    engine alone.
    """
    alone = _complete(engine, prompt, cache_salt="alone")
    for _ in range(2):
        _equal(_complete(asked, prompt), alone, exact=exact)


def _complete(api: Api, prompt: str, **fields: Any) -> list[tuple[int, float]]:
    """Return the token ids of a greedy completion, each with its logprob."""
    body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
    body |= {"logprobs": 1, "return_token_ids": True, **fields}
    status, answer = api.post("/v1/completions", body)
    if status != 200:
        raise PdlaunchError(f"HTTP {status}: {error_message(answer)}")
    choice = answer["choices"][0]
    return list(zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True))


def _equal(judged: list[tuple[int, float]], alone: list[tuple[int, float]], *, exact: bool) -> None:
    lengths = f"{len(judged)} tokens, and {len(alone)} from the engine alone"
    pairs = zip(judged, alone, strict=False)
    for number, ((token, logprob), (other, other_logprob)) in enumerate(pairs, 1):
        apart = abs(logprob - other_logprob)
        if exact and token != other:
            raise PdlaunchError(f"tokens differ from number {number} on: {lengths}")
        if not exact and apart > SMOKE_LOGPROB_TOLERANCE:
            raise PdlaunchError(
                f"logprobs differ by {apart:.3g} at number {number}, and may by "
                f"{SMOKE_LOGPROB_TOLERANCE}: {lengths}"
            )
        if token != other:
            return
    if len(judged) != len(alone):
        raise PdlaunchError(f"one answer is longer: {lengths}")


def _compare_stream(router: Api) -> None:
    body = {"prompt": _PROMPTS[1], "max_tokens": NUM_TOKENS, "temperature": 0}
    whole = router.post("/v1/completions", body)[1]["choices"][0]["text"]
    lines = router.post_text("/v1/completions", body | {"stream": True}).splitlines()
    events = [json.loads(line[5:]) for line in lines if line.startswith("data: {")]
    streamed = "".join(choice["text"] for event in events for choice in event.get("choices", []))
    if streamed != whole:
        raise PdlaunchError(
            f"the stream has {len(streamed)} characters, the whole answer {len(whole)}, and they "
            "differ"
        )


def _pulled_bytes(engines: Iterable[Api]) -> float:
    pages = [engine.metrics() for engine in engines]
    return sum(page.get(name, 0.0) for page in pages for name in BYTES_READ)


def _moved(engines: Collection[Api], before: float) -> None:
    deadline_at = time.monotonic() + _IDLE_TIMEOUT_S
    while _pulled_bytes(engines) <= before:
        if time.monotonic() > deadline_at:
            raise PdlaunchError(
                "no KV byte was pulled: every prompt was recomputed by the decode engines"
            )
        time.sleep(_POLL_S)


def _idle(admin: Api) -> None:
    left = await_idle(admin, timeout_s=_IDLE_TIMEOUT_S)
    if left:
        raise PdlaunchError(f"still there after {_IDLE_TIMEOUT_S:.0f} s: {'; '.join(left)}")


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


def _left(admin: Api) -> list[str]:
    of_vllm = {engine["name"] for engine in engines_of(admin) if engine.get("kind") == "vllm"}
    left = [
        f"{name}: {metric} is {value:g}"
        for name in of_vllm
        for metric in _VLLM_MUST_BE_ZERO
        if (value := admin.engine(name).metrics()[metric])
    ]
    status, answer = admin.get_object("/pdlaunch/integrity")
    if "engines" not in answer:
        raise PdlaunchError(f"the router does not tell its engines: HTTP {status}: {answer}")
    for report in answer["engines"]:
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
