"""Load with known answers: every answer of a deployment must be that of one engine alone, or a
clear error.

One engine alone moves no KV blocks, so it gives the reference, before the load begins. The load
then mixes streams and whole answers, greedy and seeded ones, choices, log-probabilities, shared
prefixes and clients that go away. ``pdlaunch smoke --chaos`` and ``make soak`` run it against
deployments whose transfers are faulty and whose processes die.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import aiohttp
import msgspec

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import admin_api
from pdlaunch.launch.client.integrity import await_idle, engine_totals
from pdlaunch.launch.client.smoke import engines_of
from pdlaunch.protocol.costs import ROUTE_HEADER, WANTS_PAIR
from pdlaunch.testing.answers import ReceivedAnswer, collect_stream, difference, read_answer

_PATH = "/v1/completions"
_REFERENCE_CONCURRENCY = 4


class SoakOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Sets what one soak sends to a running deployment."""

    url: str
    api_key: str | None = None
    seed: int = 0
    num_requests: int = 200
    concurrency: int = 8
    num_cases: int = 32
    """Number of different requests; each is sent many times."""
    min_token_id: int = 3
    max_token_id: int = 256
    longest_prompt_tokens: int = 120
    longest_output_tokens: int = 24
    longest_patience_s: float = 0.2
    cancel_share: float = 0.15
    """Share of clients that mean to go away in the middle; some have their answer before."""
    num_cancels: int | None = None
    """The load ends before its last request once so many clients have gone away without their whole
    answer.
    """
    wants_pairs: bool = True
    """Requests go through pairs, as transfers are what is to fail; else as the router chooses."""
    requests_a_salt: int = 16
    """Number of requests in a row that can share prefixes; fewer mean more pulls."""
    request_timeout_s: float = 120.0
    """A request that takes longer is stuck."""
    idle_timeout_s: float = 60.0

    def headers(self) -> dict[str, str]:
        """Return the headers of requests to the router."""
        route = {ROUTE_HEADER: WANTS_PAIR} if self.wants_pairs else {}
        return route | {"Authorization": f"Bearer {self.api_key}"} if self.api_key else route


class Case(msgspec.Struct, frozen=True):
    """Holds one request and its right answer."""

    body: dict[str, Any]
    expected: ReceivedAnswer


class SentRequest(msgspec.Struct, frozen=True):
    """Records the times of one request, in seconds of the monotonic clock."""

    outcome: str
    start_at: float
    end_at: float
    longest_gap_s: float
    """Longest time between two pieces of its answer, or before the first."""


class SoakReport(msgspec.Struct, kw_only=True):
    """Tells what the clients saw, and what the engines' integrity checks say afterwards."""

    num_requests: int = 0
    sent: list[SentRequest] = []
    outcomes: Counter[str] = msgspec.field(default_factory=Counter)
    """Counts of ``equal``, ``cancelled``, ``error`` (it says why), ``wrong``, ``broken`` (no end,
    no reason, or an internal error) and ``stuck``.
    """
    details: list[str] = []
    """The first few requests that ended neither equal nor cancelled, with what was asked and
    answered.
    """
    left: list[str] = []
    """Return what the engines still hold, or what is wrong with them."""
    totals: dict[str, float] = {}
    """Counters of engines and router; only of processes that were alive at the end."""
    seconds: float = 0.0
    longest_s: float = 0.0
    """Time of the slowest request that was answered."""

    @property
    def failures(self) -> list[str]:
        """Say why this soak has failed; errors that say why are no failure."""
        found = [
            f"{self.outcomes[kind]} {kind}"
            for kind in ("wrong", "broken", "stuck")
            if self.outcomes[kind]
        ]
        return [*found, *(self.details if found else []), *self.left]


async def soak(options: SoakOptions) -> SoakReport:
    """Ask for the reference answers, send the load, check the engines.

    Raises PdlaunchError when the deployment gives no reference.
    """
    async with soak_session(options) as session:
        return await run_load(session, options, await make_cases(options))


def soak_session(options: SoakOptions) -> aiohttp.ClientSession:
    """Make a client session for ``run_load``.

    Each request has a connection of its own, like those of many clients.
    """
    timeout = aiohttp.ClientTimeout(total=options.request_timeout_s)
    return aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True)
    )


async def make_cases(options: SoakOptions) -> list[Case]:
    """Make random requests, with the answers of one engine that is alone with them.

    Raises PdlaunchError when it does not answer.
    """
    admin = admin_api(options.url)
    engines = await asyncio.to_thread(engines_of, admin)
    name = next(engine["name"] for engine in engines if engine["role"] in ("decode", "both"))
    source = random.Random(options.seed)
    prefixes = [_tokens(source, options, options.longest_prompt_tokens) for _ in range(3)]
    bodies = [_random_body(source, options, prefixes) for _ in range(options.num_cases)]
    gate = asyncio.Semaphore(_REFERENCE_CONCURRENCY)

    async def ask(body: dict[str, Any]) -> Case:
        alone = body | {"cache_salt": "reference", "stream": False}
        async with gate:
            status, answer = await asyncio.to_thread(admin.engine(name).post, _PATH, alone)
        if status != 200:
            raise PdlaunchError(f"{name} gives no reference: HTTP {status}: {answer}")
        return Case(body, read_answer(answer))

    return list(await asyncio.gather(*map(ask, bodies)))


async def run_load(
    session: aiohttp.ClientSession,
    options: SoakOptions,
    cases: Sequence[Case],
    *,
    stop: asyncio.Event | None = None,
) -> SoakReport:
    """Send every request, or those until ``stop``, then check that the engines hold nothing."""
    load, admin = _Load(session, options, cases, stop or asyncio.Event()), admin_api(options.url)
    start_at = time.monotonic()
    await asyncio.gather(*(load.work() for _ in range(options.concurrency)))
    report = load.report
    report.seconds = round(time.monotonic() - start_at, 2)
    report.left = await asyncio.to_thread(await_idle, admin, timeout_s=options.idle_timeout_s)
    report.totals = await asyncio.to_thread(engine_totals, admin)
    return report


class _Load:
    """Sends the requests of one soak, drawn one after the other by all workers."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        options: SoakOptions,
        cases: Sequence[Case],
        stop: asyncio.Event,
    ) -> None:
        self._stop = stop
        self.report = SoakReport()
        self._session = session
        self._options = options
        self._cases = cases
        self._headers = options.headers()
        self._source = random.Random(f"{options.seed}/load")

    async def work(self) -> None:
        while not self._is_over():
            number = self.report.num_requests
            self.report.num_requests += 1
            case = self._source.choice(self._cases)
            salt = f"{self._options.seed}/{number // self._options.requests_a_salt}"
            patience_s = (
                self._source.uniform(0, self._options.longest_patience_s)
                if self._source.random() < self._options.cancel_share
                else None
            )
            await self._account(number, ReceivedAnswer(), case, salt, patience_s)

    def _is_over(self) -> bool:
        options, report = self._options, self.report
        if options.num_cancels is not None and report.outcomes["cancelled"] >= options.num_cancels:
            return True
        return report.num_requests >= options.num_requests or self._stop.is_set()

    async def _account(
        self, number: int, answer: ReceivedAnswer, case: Case, salt: str, patience_s: float | None
    ) -> None:
        report, start_at = self.report, time.monotonic()
        outcome, detail = await self._send(answer, case, salt, patience_s)
        end_at = time.monotonic()
        report.outcomes[outcome] += 1
        instants = [start_at, *answer.events_at, end_at]
        gap_s = max(late - early for early, late in pairwise(instants))
        report.sent.append(SentRequest(outcome, start_at, end_at, gap_s))
        if outcome in ("equal", "error"):
            report.longest_s = round(max(report.longest_s, end_at - start_at), 2)
        if outcome not in ("equal", "cancelled") and len(report.details) < 20:
            report.details.append(
                f"request {number}: {outcome} after {end_at - start_at:.1f} s: {detail}"
            )

    async def _send(
        self, answer: ReceivedAnswer, case: Case, salt: str, patience_s: float | None
    ) -> tuple[str, str]:
        """Send a request; return its outcome and the details.

        ``patience_s``: its client goes away after so long.
        """
        try:
            async with asyncio.timeout(patience_s):
                if error := await self._ask(case.body | {"cache_salt": salt}, answer):
                    return "error", error
        except TimeoutError:
            if patience_s is None:
                return "stuck", str(case.body)
            wrong = difference(answer, case.expected, is_whole=False)
            return ("wrong", wrong) if wrong else ("cancelled", "")
        except (aiohttp.ClientError, PdlaunchError, ValueError, LookupError) as error:
            return "broken", repr(error)
        wrong = difference(answer, case.expected, is_whole=True)
        return ("wrong", f"{wrong} {case.body}") if wrong else ("equal", "")

    async def _ask(self, body: dict[str, Any], answer: ReceivedAnswer) -> str | None:
        """Fill ``answer`` as it comes; return the error that the deployment gave instead."""
        async with self._session.post(
            self._options.url + _PATH, json=body, headers=self._headers
        ) as response:
            if response.status != 200:
                error = (await response.json())["error"]
                text = f"HTTP {response.status}: {error['message']}"
                if response.status == 500:
                    # A bug of ours, which tells the client nothing.
                    raise PdlaunchError(text)
                return text
            if body["stream"]:
                return await collect_stream(response.content, answer)
            answer.choices = read_answer(await response.json()).choices
            return None


def _random_body(
    source: random.Random, options: SoakOptions, prefixes: Sequence[list[int]]
) -> dict[str, Any]:
    num_prompt_tokens = source.randint(1, options.longest_prompt_tokens)
    num_shared = source.choice([0, num_prompt_tokens // 2, num_prompt_tokens - 1])
    prompt = source.choice(prefixes)[:num_shared] + _tokens(
        source, options, num_prompt_tokens - num_shared
    )
    body = {
        "prompt": prompt,
        "max_tokens": source.randint(1, options.longest_output_tokens),
        "n": source.choice([1, 1, 1, 2, 3]),
        "stream": source.random() < 0.6,
        "ignore_eos": source.random() < 0.7,
        "return_token_ids": True,
        "temperature": 0,
    }
    if source.random() < 0.4:
        body |= {"temperature": 1, "seed": source.randrange(2**31)}
    if source.random() < 0.4:
        body["logprobs"] = 2
    return body


def _tokens(source: random.Random, options: SoakOptions, num_tokens: int) -> list[int]:
    return [source.randrange(options.min_token_id, options.max_token_id) for _ in range(num_tokens)]
