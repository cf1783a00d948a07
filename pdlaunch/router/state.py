"""Holds the objects that all requests share."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any, TypeVar

import msgspec

from pdlaunch.errors import KillsEngineError
from pdlaunch.http.headers import ORIGIN_HEADER, format_origin
from pdlaunch.protocol.control import PairSuspect, Registry, Suspects
from pdlaunch.protocol.ids import HopId, LeaseId, PromptOrigin
from pdlaunch.protocol.openai.responses import ModelList
from pdlaunch.protocol.process.bootstrap import ClientKey
from pdlaunch.protocol.status import EventKind, GoneEngine, StatusEvent
from pdlaunch.router.clients import Clients, Turns
from pdlaunch.router.engine import Engine, EngineKey
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.kv_index import KVFollower
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.pool import EnginePool
from pdlaunch.router.prompt_reader import PromptReader
from pdlaunch.router.recovery import RecoverySettings

logger = logging.getLogger(__name__)

# How long an engine that hangs, or is gone, may still answer earlier requests.
LOST_S = 5.0
MAX_EVENTS = 100
MAX_TEXT = 500  # characters of an event; the last words of a dead process may be longer
GONE_S = 600.0
SETTLE_S = 2.0

T = TypeVar("T")


class SuspectPrompts:
    """Counts, for each running prompt, the deaths of ranks that it may have caused.

    When a rank dies, the prompts of its last step become suspects. A step never has two suspects,
    so a suspect whose step ends with another death is the cause.
    """

    def __init__(self) -> None:
        # 0; 1 for a suspect; 2 for a suspect after another death.
        self._num_deaths: dict[PromptOrigin, int] = {}

    @contextmanager
    def watch(self, origin: PromptOrigin) -> Iterator[None]:
        self._num_deaths[origin] = 0
        try:
            yield
        finally:
            del self._num_deaths[origin]

    def take(self, suspects: Suspects) -> None:
        for origin in self._num_deaths.keys() & suspects.origins:
            num_deaths = 2 if origin in suspects.repeated else 1
            self._num_deaths[origin] = max(num_deaths, self._num_deaths[origin])

    def is_suspect(self, origin: PromptOrigin) -> bool:
        return self._num_deaths[origin] > 0

    def header(self, origin: PromptOrigin) -> dict[str, str]:
        marked = format_origin(origin, is_suspect=True)
        return {ORIGIN_HEADER: marked} if self.is_suspect(origin) else {}

    def check(self, origin: PromptOrigin) -> None:
        if self._num_deaths[origin] > 1:
            raise KillsEngineError(
                "this request crashed an engine twice, the second time without other requests; it "
                "is not retried"
            )


class EventLog:
    def __init__(self) -> None:
        self.events: deque[StatusEvent] = deque(maxlen=MAX_EVENTS)
        self._seen: dict[str, tuple[str | None, str]] = {}  # roles and states of engines
        self._gone: dict[str, tuple[str | None, float]] = {}
        # Engines that were ready and have not slept or drained since.
        self._served: set[str] = set()

    def add(self, kind: EventKind, name: str, text: str, *, is_bad: bool) -> None:
        at, text = time.time(), text[:MAX_TEXT]
        self.events.append(StatusEvent(at=at, kind=kind, name=name, text=text, is_bad=is_bad))

    def gone(self) -> list[GoneEngine]:
        """Return the engines that were lost in the last minutes and are not back."""
        now_at = time.time()
        # Forget old ones: an engines_file may list new names without end.
        gone = [(name, each) for name, each in self._gone.items() if now_at - each[1] < GONE_S]
        self._gone = dict(gone)
        return [GoneEngine(name=name, role=role, gone_s=now_at - at) for name, (role, at) in gone]

    def is_down(self, engine: Engine) -> bool:
        """Return whether an engine does not work and no command is the reason."""
        if engine.state == "starting":
            return engine.name in self._served
        return engine.state in ("failed", "stalled")

    def engines_changed(self, registry: Registry, engines: Sequence[Engine]) -> None:
        before, self._seen = self._seen, {each.name: (each.role, each.state) for each in engines}
        for engine in engines:
            name, state = engine.name, engine.state
            if state == "ready":
                self._served.add(name)
            elif state in ("sleeping", "draining"):
                self._served.discard(name)
            self._gone.pop(name, None)
            _, state_before = before.get(name, (None, ""))
            # Skip the start of a launch: it would add an event for each engine.
            is_first = not state_before and (not before or registry.withheld == "starting")
            if state_before == state or is_first:
                continue
            was = f"was {state_before}" if state_before else "new"
            reason = f": {engine.entry.reason}" if engine.entry.reason else ""
            self.add("engine", name, f"{state} ({was}){reason}", is_bad=self.is_down(engine))
        for name, (role, state) in before.items():
            if name not in self._seen:
                self.add("engine", name, f"gone (was {state})", is_bad=state == "ready")
                # `pdlaunch scale` drains an engine, or removes one that was down: it is not missed.
                if state == "ready":
                    self._gone[name] = (role, time.time())
        self._served &= self._seen.keys() | {each.name for each in self.gone()}


@dataclass(eq=False)
class RouterState:
    """Holds the objects that all requests of the process share. Belongs to the event loop."""

    pool: EnginePool
    client: EngineClient
    metrics: RouterMetrics
    recovery: RecoverySettings = field(default_factory=RecoverySettings)
    _: KW_ONLY
    prove_again: Callable[[PairSuspect], None]  # requests a new canary for a pair
    model_dir: InitVar[str] = ""
    keys: InitVar[Sequence[ClientKey]] = ()

    def __post_init__(self, model_dir: str, keys: Sequence[ClientKey]) -> None:
        self.clients = Clients(keys, self.metrics, self.pool.clock)
        self.turns = Turns(self.pool.can_begin, is_fair=len(keys) > 1)
        self.suspects = SuspectPrompts()
        self.events = EventLog()
        # The last failure of each pair whose engines exist or may come back.
        self.pair_failures: dict[tuple[str, str], str] = {}
        self.reader = PromptReader(self.pool, self.client, model_dir)
        self._follower = KVFollower(self.pool.index, self.client.follow)
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._asked: set[EngineKey] = set()  # engines that are being asked for their models

    def update(self, registry: Registry) -> None:
        """Apply a registry and wake the requests that wait for an engine."""
        before = self.pool.engines
        self.pool.update(registry)
        for engine in before:
            if self._is_lost(engine):
                # Wait first: its process may still close the calls, or answer again.
                asyncio.get_running_loop().call_later(LOST_S, self._give_up, engine)
        self._follower.update(self.pool.engines)
        if sum(engine.ready for engine in self.pool.engines) > 1:
            self.spawn(self.reader.load(registry.text_files))
        self.events.engines_changed(registry, self.pool.engines)
        names = {each.name for each in self.pool.engines}
        names |= {each.name for each in self.events.gone()}
        failures = self.pair_failures.items()
        self.pair_failures = {pair: error for pair, error in failures if names.issuperset(pair)}
        self.metrics.show_registry(registry)
        # Use a new event for each change, so that later waiters wait for the next change.
        self._changed.set()
        self._changed = asyncio.Event()
        self.turns.take()
        for engine in self.pool.engines:
            if engine.ready and engine.max_model_len is None and engine.key not in self._asked:
                self._asked.add(engine.key)
                self.spawn(self._learn_models(engine, engine.key))

    def _is_lost(self, engine: Engine) -> bool:
        """Return whether the running calls to an engine should be given up."""
        # Not if its supervisor ends them: it kills hung ranks, and processes on hosts it reaches.
        listed = {each.name: each for each in self.pool.engines}.get(engine.name)
        if listed is None or listed.url != engine.url:
            return True
        return listed.state == "stalled" and len(listed.processes) == 1

    def _give_up(self, engine: Engine) -> None:
        if self._is_lost(engine):
            engine.calls.end_all()

    async def _learn_models(self, engine: Engine, key: EngineKey) -> None:
        page = await self.client.read(engine, "/v1/models")
        self._asked.discard(key)
        with suppress(ValueError, RecursionError):
            engine.models = msgspec.json.decode(page or b"", type=ModelList).data
            engine.max_model_len = engine.models[0].max_model_len if engine.models else None

    def recomputed(
        self, prefill: Engine, decode: Engine, num_tokens: int, *, is_in_doubt: bool
    ) -> None:
        """Record that decode has computed ``num_tokens`` although it was given their KV blocks.
        With ``is_in_doubt``, the pair is not used until a canary has proven it again.
        """
        error = f"decode computed {num_tokens} tokens although it was handed their KV blocks"
        logger.warning("%s -> %s: %s", prefill.name, decode.name, error)
        self.metrics.count("silent_recomputes", prefill.name, decode.name)
        self.pair_failed(prefill.name, decode.name, error)
        if is_in_doubt:
            self.doubt(decode.name, prefill.name, prefill.processes[0], error)

    def pair_failed(self, prefill: str, decode: str, error: str) -> None:
        self.events.add("pair", f"{prefill} -> {decode}", error, is_bad=True)
        self.pair_failures[prefill, decode] = error

    def doubt(self, local: str, peer: str, peer_incarnation: int, error: str) -> None:
        pair = PairSuspect(local=local, peer=peer, peer_incarnation=peer_incarnation, error=error)
        self.pool.doubt(pair)
        self.prove_again(pair)

    def release(self, engine: Engine, name: HopId | LeaseId) -> None:
        """Release a lease that will not be pulled, if the prefill engine is a native one."""
        if not engine.capabilities.is_vllm:
            self.metrics.count("releases")
            self.spawn(self.client.notify(engine, "/pdlaunch/release", {"request_id": name}))

    async def find(self, look: Callable[[], T], timeout_s: float) -> T:
        """Call ``look`` at each change of the registry until its result is true, at most for
        ``timeout_s``; return the last result.
        """
        until_at = self.now() + timeout_s
        while not (found := look()) and (left_s := until_at - self.now()) > 0:
            await self.registry_change(left_s)
        return found

    async def registry_change(self, timeout_s: float | None = None) -> None:
        changed = self._changed
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await changed.wait()

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` as a task that may outlive the request that spawns it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settled(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=SETTLE_S)

    async def close(self) -> None:
        await self.settled()
        await self._follower.close()
        await self.client.close()
