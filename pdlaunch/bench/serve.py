"""Drives a running deployment through its public API and measures what a client sees.

Prompts are random token ids, different in every run, so that no prefix cache helps; ``ignore_eos``
fixes the output length.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.bench.loads import FIRST_TOKEN_ID, BenchLoad, BenchOptions, PlannedRequest, plan_loads
from pdlaunch.bench.rows import BenchRun, PullCounts, summarise
from pdlaunch.bench.timed_completion import (
    TimedCompletion,
    complete,
    describe_failure,
    read_refusal,
)
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import check_url

REQUEST_TIMEOUT_S = 600.0
_POLL_S = 0.2
_PATIENCE_S = 3.0  # engines report their counters about once a second
_PULL_COUNTERS = {
    "pdlaunch_kv_transfers_total": "num_pulls",
    "pdlaunch_kv_transfer_seconds_total": "seconds",
    "pdlaunch_kv_transfer_bytes_total": "num_bytes",
}

ShowProgress = Callable[[str], None]


class BenchTarget(msgspec.Struct, frozen=True):
    """A deployment that has answered the question for its model."""

    session: aiohttp.ClientSession
    model: str
    max_model_len: int | None  # None: the deployment does not say

    async def complete(self, prompt: list[int], output_tokens: int) -> TimedCompletion:
        return await complete(self.session, self.model, prompt, output_tokens)


@contextlib.asynccontextmanager
async def _open_target(options: BenchOptions) -> AsyncIterator[BenchTarget]:
    """Ask the deployment for its model. Raises PdlaunchError when it cannot be used."""
    url = options.url
    check_url(url)
    async with aiohttp.ClientSession(
        url,
        headers={"Authorization": f"Bearer {options.api_key}"} if options.api_key else {},
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
        # The load decides how many connections there are, not the client.
        connector=aiohttp.TCPConnector(limit=0),
    ) as session:
        try:
            async with session.get("/v1/models") as response:
                if response.status != 200:
                    raise PdlaunchError(f"{response.url} answers {await read_refusal(response)}")
                card = (await response.json(content_type=None))["data"][0]
                model, max_model_len = str(card["id"]), card.get("max_model_len")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise PdlaunchError(
                f"{url} does not answer /v1/models: {describe_failure(error)}"
            ) from error
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise PdlaunchError(f"{url} answers /v1/models, but with no list of models") from error
        yield BenchTarget(session, model, max_model_len if type(max_model_len) is int else None)


async def bench_serve(options: BenchOptions, show: ShowProgress) -> AsyncIterator[BenchRun]:
    """Measure one load after the other, after a warm-up request for each prompt length.

    Raises PdlaunchError when the deployment cannot be used, or refuses a warm-up request.
    """
    async with _open_target(options) as target:
        # Another seed in every run, or prefix caches would have the prompts already.
        rng = random.Random(options.seed if options.seed is not None else time.time_ns())
        loads = plan_loads(options, target.model, target.max_model_len, rng)
        for num_tokens in dict.fromkeys(load.input_tokens for load in loads):
            show(f"warming up with a prompt of {num_tokens} tokens")
            prompt = rng.choices(range(FIRST_TOKEN_ID, options.max_token_id), k=num_tokens)
            # A request of a trace may have two output tokens only.
            warm_up = await target.complete(prompt, 2 if options.trace else options.output_tokens)
            if warm_up.error is not None:
                raise PdlaunchError(
                    f"the deployment does not take a request of {num_tokens} prompt tokens: "
                    f"{warm_up.error}"
                )
        start_at, num_done, num_all = time.monotonic(), 0, sum(len(load.requests) for load in loads)

        def count_one() -> None:
            nonlocal num_done
            num_done += 1
            left_s = (time.monotonic() - start_at) / num_done * (num_all - num_done)
            show(f"{num_done} of {num_all} requests, about {left_s:.0f} s left")

        for load in loads:
            yield await _run(target, options, load, count_one)


async def _run(
    target: BenchTarget, options: BenchOptions, load: BenchLoad, count_one: Callable[[], None]
) -> BenchRun:
    done: list[TimedCompletion] = []
    waiting = iter(load.requests)

    async def send(planned: PlannedRequest) -> None:
        make_prompt, output_tokens = planned
        done.append(await target.complete(make_prompt(), output_tokens))
        count_one()

    async def work() -> None:
        for planned in waiting:
            await send(planned)

    before = await _pull_counts(target)
    start_at = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        if load.concurrency is not None:
            # Each worker sends its next request when its last one has ended.
            for _ in range(load.concurrency):
                group.create_task(work())
        else:
            for at_s, planned in zip(load.times_s, load.requests, strict=True):
                await asyncio.sleep(max(0.0, start_at + at_s - time.perf_counter()))
                group.create_task(send(planned))
    seconds = time.perf_counter() - start_at
    # A request with one output token needs no pull.
    num_pulls = sum(each.error is None and each.num_tokens > 1 for each in done)
    pulled = None if before is None else await _pulled_since(target, before, num_pulls)
    row = summarise(
        load, done, seconds, pulled=pulled, goals=options.goals, burstiness=options.burstiness
    )
    return BenchRun(row=row, done=done, model=target.model)


async def _pull_counts(target: BenchTarget) -> PullCounts | None:
    """Return the totals of the decode engines; None if ``/metrics`` lacks them."""
    try:
        async with target.session.get("/metrics") as response:
            page = await response.text() if response.status == 200 else ""
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if name := _PULL_COUNTERS.get(sample.name):
                    totals[name] = totals.get(name, 0.0) + sample.value
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None
    return PullCounts(**totals) if len(totals) == len(_PULL_COUNTERS) else None


async def _pulled_since(
    target: BenchTarget, before: PullCounts, num_pulls: int
) -> PullCounts | None:
    """Return the pulls since ``before``: when there are ``num_pulls``, or after a few seconds.

    None if an engine has restarted, since its counters began again at 0.
    """
    deadline_at = time.monotonic() + _PATIENCE_S
    while True:
        now = await _pull_counts(target)
        if now is None or now.num_pulls < before.num_pulls:
            return None
        added = PullCounts(
            now.num_pulls - before.num_pulls,
            now.seconds - before.seconds,
            now.num_bytes - before.num_bytes,
        )
        if added.num_pulls >= num_pulls or time.monotonic() > deadline_at:
            return added
        await asyncio.sleep(_POLL_S)
