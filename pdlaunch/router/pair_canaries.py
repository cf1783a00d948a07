"""Proves the pairs of engines that somebody else started, and keeps what their canaries have shown.

A pair is proven once, and again when one of its engines was away, has failed requests, or is
doubted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping
from typing import Any, Literal

from pdlaunch.errors import ProtocolError
from pdlaunch.http.watch.canary import CanaryDied, Proof, send_canary
from pdlaunch.protocol.control import PairReady
from pdlaunch.protocol.due_pairs import Pair
from pdlaunch.router.membership_pairs import Results
from pdlaunch.router.watched_engine import WatchedEngine, WatchSettings

CanaryOutcome = Literal["proven", "failed"]

_logger = logging.getLogger(__name__)

NUM_CANARIES = 4
"""Canaries under way at a time."""
CANARY_RETRY_S = (0.5, 30.0)
"""First and longest pause before a canary that died is sent again."""


class PairCanaries:
    """Sends canaries through pairs; belongs to the event loop.

    ``engines``: those that are watched, by name. ``report``: is told each canary's outcome.
    ``on_result``: is called when a pair has a new result.
    """

    def __init__(
        self,
        settings: WatchSettings,
        engines: Mapping[str, WatchedEngine],
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        report: Callable[[CanaryOutcome], None],
        on_result: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._engines = engines
        self._spawn = spawn
        self._report = report
        self._on_result = on_result
        self._results: dict[Pair, Proof | str] = {}
        self._tasks: dict[Pair, asyncio.Task[None]] = {}
        self._at_once = asyncio.Semaphore(NUM_CANARIES)

    @property
    def results(self) -> Results:
        return self._results

    def prove(self, due: Collection[Pair]) -> None:
        """Prove those of these pairs that have no result, and no other pair."""
        for pair in self._tasks.keys() - due:
            self._tasks.pop(pair).cancel()
        for pair in due - self._tasks.keys() - self._results.keys():
            self._tasks[pair] = self._spawn(self._prove(pair))

    def forget(self, name: str) -> None:
        """Forget the pairs of an engine that is not what it was, and stop their canaries."""
        self.doubt_engine(name)
        for pair in [pair for pair in self._tasks if name in pair]:
            self._tasks.pop(pair).cancel()

    def doubt_engine(self, name: str) -> None:
        """Have the pairs of an engine proven again."""
        for pair in [pair for pair in self._results if name in pair]:
            del self._results[pair]

    def doubt(self, pair: Pair) -> bool:
        """Have a pair proven again; False when it has no result to be doubted."""
        return self._results.pop(pair, None) is not None

    def proven(self) -> Iterator[PairReady]:
        """Yield the pairs that are proven, as a registry lists them."""
        for (prefill, decode), proof in self._results.items():
            if isinstance(proof, Proof):
                yield PairReady(
                    local=decode,
                    peer=prefill,
                    peer_incarnation=self._engines[prefill].incarnation,
                    seconds=proof.seconds,
                    path=f"canary/{self._settings.kind}"
                    if self._engines[decode].is_checked
                    else "canary, unchecked",
                    gigabytes_per_s=proof.gigabytes_per_s,
                )

    async def _prove(self, pair: Pair) -> None:
        """Send canaries through a pair until one comes through."""
        prefill, decode = (self._engines[name] for name in pair)
        pause_s, longest_s = CANARY_RETRY_S
        while True:
            result = await self._send_canary(prefill, decode)
            if isinstance(result, str):
                _logger.warning("%s -> %s: %s", *pair, result)
            self._report("failed" if isinstance(result, str) else "proven")
            self._results[pair] = result
            if isinstance(result, Proof):
                del self._tasks[pair]
                self._note_what_is_told(decode, result)
            self._on_result()
            if isinstance(result, Proof):
                return
            await asyncio.sleep(pause_s)
            pause_s = min(longest_s, 2 * pause_s)

    def _note_what_is_told(self, decode: WatchedEngine, proof: Proof) -> None:
        was_checked, decode.tells_recomputes = decode.is_checked, proof.is_told
        if was_checked and not decode.is_checked:
            _logger.warning(
                "%s does not tell how much of a prompt it computes: where it computes what it was "
                "handed, nobody sees it; start it with --enable-prompt-tokens-details",
                decode.member.name,
            )

    async def _send_canary(self, prefill: WatchedEngine, decode: WatchedEngine) -> Proof | str:
        settings = self._settings
        try:
            async with decode.one_at_a_time, self._at_once:
                return await send_canary(
                    prefill.api,
                    decode.api,
                    settings.served_model_name,
                    is_exact=settings.is_exact,
                    kind=settings.kind,
                )
        except (CanaryDied, ProtocolError) as error:
            return str(error)
        except Exception as error:
            # Whatever an engine answers must not keep the pair from being tried again.
            _logger.exception("a canary cannot be sent")
            return f"{type(error).__name__}: {error}"
