"""Load with known answers: every answer of a deployment must be that of one engine alone, or a
clear error.

One engine alone moves no KV blocks, so it gives the reference, before the load begins. The load
mixes streams and whole answers, greedy and seeded ones, choices, log-probabilities, shared prefixes
and clients that go away. ``make soak`` runs it against deployments whose transfers are faulty and
whose processes die.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterable, Sequence
from itertools import pairwise
from typing import Any

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.errors import PdlaunchError, ProtocolError
from pdlaunch.http.headers import ROUTE_HEADER, WANTS_PAIR
from pdlaunch.protocol.engine import EngineStats
from tests.e2e.agreement import await_idle, engines_of
from tests.e2e.client import Api, admin_api

LOGPROB_TOLERANCE = 1e-3
"""Tolerance in nats, in float32: batches of other shapes add in another order."""
_PATH = "/v1/completions"
_MIN_TOKEN_ID, _MAX_TOKEN_ID = 3, 256
_MAX_DETAILS = 20
_REQUEST_TIMEOUT_S = 120.0
"""A request that takes longer is stuck."""
_IDLE_TIMEOUT_S = 60.0


class ReceivedAnswer(msgspec.Struct):
    """Holds the choices of an answer as far as they have come, and when events of a stream came."""

    token_ids: dict[int, list[int]] = {}
    text: dict[int, str] = {}
    logprobs: dict[int, list[float]] = {}
    finish_reasons: dict[int, str] = {}
    events_at: list[float] = []

    def add(self, pieces: Sequence[dict[str, Any]]) -> None:
        for piece in pieces:
            index = piece["index"]
            if index in self.finish_reasons:
                raise ProtocolError(f"choice {index} goes on after its end")
            self.token_ids.setdefault(index, []).extend(piece.get("token_ids") or [])
            self.text[index] = self.text.get(index, "") + (piece.get("text") or "")
            logprobs = (piece.get("logprobs") or {}).get("token_logprobs", [])
            self.logprobs.setdefault(index, []).extend(logprobs)
            if piece.get("finish_reason"):
                self.finish_reasons[index] = piece["finish_reason"]


class SoakOptions(msgspec.Struct, frozen=True, kw_only=True):
    url: str
    seed: int = 0
    num_requests: int = 200
    concurrency: int = 8
    num_cases: int = 32
    """Number of different requests; each is sent many times."""
    longest_prompt_tokens: int = 120
    longest_output_tokens: int = 24
    longest_patience_s: float = 0.2
    cancel_share: float = 0.15
    """Share of clients that mean to go away in the middle; some have their answer before."""
    num_cancels: int | None = None
    """The load ends once this many clients have gone away without their whole answer."""
    wants_pairs: bool = True
    """Requests go through pairs, whose transfers are to fail; else as the router chooses."""
    requests_a_salt: int = 16
    """Number of requests in a row that can share prefixes; fewer mean more pulls."""


class Case(msgspec.Struct, frozen=True):
    body: dict[str, Any]
    expected: ReceivedAnswer


class SentRequest(msgspec.Struct, frozen=True):
    """Records one request; ``longest_gap_s``: before, between and after the events of a stream."""

    outcome: str
    start_at: float
    end_at: float
    longest_gap_s: float


class SoakReport(msgspec.Struct, kw_only=True):
    """Tells what the clients saw, and what the engines' integrity checks say afterwards."""

    num_requests: int = 0
    sent: list[SentRequest] = []
    outcomes: Counter[str] = msgspec.field(default_factory=Counter)
    """Counts of ``equal``, ``cancelled``, ``error`` (with a reason), ``wrong``, ``broken`` (no end,
    no reason, or an internal error) and ``stuck``.
    """
    details: list[str] = []
    """The first requests that ended neither equal nor cancelled, with prompts and answers."""
    left: list[str] = []
    """What the engines still hold, or what is wrong with them."""
    totals: dict[str, float] = {}
    """Counters of engines and router; only of processes that were alive at the end."""
    seconds: float = 0.0
    longest_s: float = 0.0
    """Time of the slowest request that was answered."""

    @property
    def failures(self) -> list[str]:
        """Say why this soak has failed; errors with a reason are no failure."""
        kinds = ("wrong", "broken", "stuck")
        found = [f"{self.outcomes[kind]} {kind}" for kind in kinds if self.outcomes[kind]]
        return [*found, *(self.details if found else []), *self.left]


async def soak(
    options: SoakOptions, cases: Sequence[Case] = (), *, stop: asyncio.Event | None = None
) -> SoakReport:
    """Send every request, or those until ``stop``; check that the engines hold nothing afterwards.

    Raises PdlaunchError when the deployment gives no reference.
    """
    load = _Load(options, cases or await make_cases(options), stop or asyncio.Event())
    report, admin = load.report, admin_api(options.url)
    start_at = time.monotonic()
    await load.run()
    report.seconds = round(time.monotonic() - start_at, 2)
    report.left = await asyncio.to_thread(await_idle, admin, timeout_s=_IDLE_TIMEOUT_S)
    report.totals = await asyncio.to_thread(engine_totals, admin)
    return report


async def make_cases(options: SoakOptions) -> list[Case]:
    """Make random requests, with the answers of one engine that is alone with them.

    Raises PdlaunchError when the engine does not answer.
    """
    admin = admin_api(options.url)
    engines = await asyncio.to_thread(engines_of, admin)
    name = next(engine["name"] for engine in engines if engine["role"] in ("decode", "both"))
    source = random.Random(options.seed)
    prefixes = [_tokens(source, options.longest_prompt_tokens) for _ in range(3)]
    bodies = [_random_body(source, options, prefixes) for _ in range(options.num_cases)]
    gate = asyncio.Semaphore(4)

    async def ask(body: dict[str, Any]) -> Case:
        alone = body | {"cache_salt": "reference", "stream": False}
        async with gate:
            status, answer = await asyncio.to_thread(admin.engine(name).post, _PATH, alone)
        if status != 200:
            raise PdlaunchError(f"{name} gives no reference: HTTP {status}: {answer}")
        expected = ReceivedAnswer()
        expected.add(answer["choices"])
        return Case(body, expected)

    return list(await asyncio.gather(*map(ask, bodies)))


async def collect_stream(lines: AsyncIterable[bytes], answer: ReceivedAnswer) -> str | None:
    """Add the events of a stream to ``answer``; return the message of an error event.

    Raises ProtocolError when the stream has no proper end.
    """
    async for line in lines:
        if not line.startswith(b"data:"):
            continue
        if line.strip() == b"data: [DONE]":
            return None
        event = json.loads(line[5:])
        if "error" in event:
            return f"in the stream: {event['error']['message']}"
        answer.events_at.append(time.monotonic())
        answer.add(event["choices"])
    raise ProtocolError("a stream that ended without [DONE]")


def difference(found: ReceivedAnswer, expected: ReceivedAnswer, *, is_whole: bool) -> str:
    """Describe how ``found`` differs from ``expected``; empty: not at all.

    ``is_whole``: False compares only what has come.
    """
    if is_whole and found.finish_reasons != expected.finish_reasons:
        return f"{found.finish_reasons} instead of {expected.finish_reasons}"
    for index, ids in found.token_ids.items():
        wanted, text, end = expected.token_ids[index], found.text[index], len(found.text[index])
        logprobs, their_logprobs = found.logprobs[index], expected.logprobs[index]
        is_ended = index in found.finish_reasons
        is_equal = (
            ids == (wanted if is_ended else wanted[: len(ids)])
            and text == (expected.text[index] if is_ended else expected.text[index][:end])
            and found.finish_reasons.get(index) in (None, expected.finish_reasons[index])
            and (len(logprobs) == len(their_logprobs) or not is_ended)
            and all(
                abs(ours - theirs) <= LOGPROB_TOLERANCE
                for ours, theirs in zip(logprobs, their_logprobs, strict=False)
            )
        )
        if not is_equal:
            return f"choice {index}: {ids} {text!r} {logprobs} instead of {wanted}"
    return ""


class _Load:
    """Sends the requests of one soak, drawn one after the other by all workers."""

    def __init__(self, options: SoakOptions, cases: Sequence[Case], stop: asyncio.Event) -> None:
        self.report = SoakReport()
        self._options = options
        self._cases = cases
        self._stop = stop
        self._source = random.Random(f"{options.seed}/load")
        self._headers = {ROUTE_HEADER: WANTS_PAIR} if options.wants_pairs else {}

    async def run(self) -> None:
        # Each request has a connection of its own, like those of many clients.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            await asyncio.gather(*(self._work(session) for _ in range(self._options.concurrency)))

    async def _work(self, session: aiohttp.ClientSession) -> None:
        options, report, source = self._options, self.report, self._source
        most_cancels = float("inf") if options.num_cancels is None else options.num_cancels
        while (
            report.outcomes["cancelled"] < most_cancels
            and report.num_requests < options.num_requests
            and not self._stop.is_set()
        ):
            number = report.num_requests
            report.num_requests += 1
            case = source.choice(self._cases)
            patience_s = source.uniform(0, options.longest_patience_s)
            leaves = source.random() < options.cancel_share
            answer, start_at = ReceivedAnswer(), time.monotonic()
            body = case.body | {"cache_salt": f"{options.seed}/{number // options.requests_a_salt}"}
            outcome, detail = await self._send(
                session, body, case.expected, answer, patience_s if leaves else None
            )
            end_at = time.monotonic()
            instants = pairwise([start_at, *answer.events_at, end_at])
            # The client of a whole answer sees no gap, and waits for the answer anyway.
            gap_s = max(late - early for early, late in instants) if answer.events_at else 0.0
            report.outcomes[outcome] += 1
            report.sent.append(SentRequest(outcome, start_at, end_at, gap_s))
            if outcome in ("equal", "error"):
                report.longest_s = round(max(report.longest_s, end_at - start_at), 2)
            if outcome not in ("equal", "cancelled") and len(report.details) < _MAX_DETAILS:
                took = f"{outcome} after {end_at - start_at:.1f} s"
                report.details.append(f"request {number}: {took}: {detail}")

    async def _send(
        self,
        session: aiohttp.ClientSession,
        body: dict[str, Any],
        expected: ReceivedAnswer,
        answer: ReceivedAnswer,
        patience_s: float | None,
    ) -> tuple[str, str]:
        """Return outcome and details of a request; its client leaves after ``patience_s``."""
        try:
            async with asyncio.timeout(patience_s):
                if error := await self._ask(session, body, answer):
                    return "error", error
        except TimeoutError:
            if patience_s is None:
                return "stuck", str(body)
            wrong = difference(answer, expected, is_whole=False)
            return ("wrong", wrong) if wrong else ("cancelled", "")
        except (aiohttp.ClientError, PdlaunchError, ValueError, LookupError) as error:
            return "broken", repr(error)
        wrong = difference(answer, expected, is_whole=True)
        return ("wrong", f"{wrong} {body}") if wrong else ("equal", "")

    async def _ask(
        self, session: aiohttp.ClientSession, body: dict[str, Any], answer: ReceivedAnswer
    ) -> str | None:
        """Fill ``answer`` as it comes; return the error that the deployment gave instead."""
        url = self._options.url + _PATH
        async with session.post(url, json=body, headers=self._headers) as response:
            if response.status != 200:
                error = (await response.json())["error"]
                text = f"HTTP {response.status}: {error['message']}"
                if response.status == 500:
                    # A bug of ours, which tells the client nothing.
                    raise PdlaunchError(text)
                return text
            if body["stream"]:
                return await collect_stream(response.content, answer)
            answer.add((await response.json())["choices"])
            return None


def _random_body(
    source: random.Random, options: SoakOptions, prefixes: Sequence[list[int]]
) -> dict[str, Any]:
    num_prompt_tokens = source.randint(1, options.longest_prompt_tokens)
    num_shared = source.choice([0, num_prompt_tokens // 2, num_prompt_tokens - 1])
    own = _tokens(source, num_prompt_tokens - num_shared)
    body = {
        "prompt": source.choice(prefixes)[:num_shared] + own,
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


def _tokens(source: random.Random, num_tokens: int) -> list[int]:
    return [source.randrange(_MIN_TOKEN_ID, _MAX_TOKEN_ID) for _ in range(num_tokens)]


def engine_totals(admin: Api) -> dict[str, float]:
    counted: Counter[str] = Counter()
    for report in admin.get_object("/pdlaunch/integrity")[1]["engines"]:
        counted.update(counters(report))
    totals = {name: round(value, 3) for name, value in counted.items()}
    for family in text_string_to_metric_families(admin.get("/metrics")[1]):
        if family.name.startswith("pdlaunch_router_") and family.type == "counter":
            values = (each.value for each in family.samples if each.name.endswith("_total"))
            totals[family.name.removeprefix("pdlaunch_")] = sum(values)
    return totals


def counters(report: dict[str, Any]) -> dict[str, float]:
    """Return what an engine's rank has counted, without its counts of an instant, which do not add
    up over time.
    """
    return {
        name: value
        for name, value in report.get("stats", {}).items()
        if name not in EngineStats.__struct_fields__ and isinstance(value, int | float)
    }
