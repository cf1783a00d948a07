"""Serves the admin routes, which command a launch and inspect its engines.

Clients' API keys open none of these routes. At the admin socket of the launch they need no key;
over TCP they need ``admin_api_key``. The router sends the launch's own token to engines. A query
selects engines with ``engine=NAME`` (may be repeated); the default is all engines not given up.

The router itself puts engines of vLLM to sleep: vLLM waits for no leases and tells no supervisor::

    hold: no new work ── nothing runs, no block is leased ── POST /sleep ── held until it is awake
    POST /wake_up ── its pairs are in doubt until new canaries succeed ── given work again
"""

import asyncio
import contextlib
import itertools
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote

import msgspec
from aiohttp import web

from pdlaunch.config.roles import Role
from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.app import AppRoute, request_id_of
from pdlaunch.http.engine_calls import Counts, is_vllm_busy
from pdlaunch.http.errors import error_body, json_response, unavailable
from pdlaunch.http.headers import REQUEST_ID_HEADER
from pdlaunch.http.lifecycle import SHUTDOWN_TIMEOUT_S
from pdlaunch.protocol.control import COMMANDS, Answered, Command, RefusalCode, Restart, SetDrained
from pdlaunch.router.engine import Engine
from pdlaunch.router.state import RouterState

IDLE_TIMEOUT_S = 600.0
IDLE_POLL_S = 0.2
# How long the registry may take to show a change that an engine or the supervisor has reported.
LISTED_TIMEOUT_S = 10.0
ENGINE_CHECK_TIMEOUT_S = 40.0  # longer than an engine waits for its rank
ANSWER_TIMEOUT_S = 10.0
# Time for a change of the engines, or for a restart. Commands of the CLI wait a little longer.
CHANGE_TIMEOUT_S = 850.0
SOCKET_BACKLOG = 32
_STATUS: dict[RefusalCode, int] = {"engine_not_found": 404, "not_now": 409, "refused": 409}

_unavailable = partial(unavailable, retry_after_s=1)
Query = Sequence[tuple[str, str]]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]


class Outcome(NamedTuple):
    engine: str
    status: int
    answer: dict[str, Any]


class SupervisorLink:
    """Sends commands to the supervisor and matches its answers. ``send`` must not block."""

    def __init__(self, send: Callable[[Command], None]) -> None:
        self._send = send
        # Start at a random number: answers to an earlier router must not match these commands.
        self._numbers = itertools.count(secrets.randbits(40))
        self._asked: dict[int, asyncio.Queue[Answered]] = {}

    async def ask(self, command: Command) -> Answered:
        """Send a command; return the answer once the change that it begins, if any, is done."""
        number, expires_at = next(self._numbers), time.monotonic() + ANSWER_TIMEOUT_S
        answers = self._asked[number] = asyncio.Queue()
        late = f"the supervisor has not answered within {ANSWER_TIMEOUT_S:g} s", "no_answer"
        try:
            self._send(msgspec.structs.replace(command, question=number, expires_at=expires_at))
            begun = await asyncio.wait_for(answers.get(), ANSWER_TIMEOUT_S)
            if begun.is_done:
                return begun
            late = f"the command is not done after {CHANGE_TIMEOUT_S:g} s; it goes on", "not_ready"
            ended = await asyncio.wait_for(answers.get(), CHANGE_TIMEOUT_S)
            return msgspec.structs.replace(begun, error=ended.error, is_done=True)
        except TimeoutError:
            raise _unavailable(*late) from None
        finally:
            del self._asked[number]

    def answered(self, message: Answered) -> None:
        if (answers := self._asked.get(message.question)) is not None:
            answers.put_nowait(message)


class Admin:
    def __init__(self, state: RouterState, supervisor: SupervisorLink) -> None:
        self._state, self._pool, self._supervisor = state, state.pool, supervisor

    def routes(self) -> list[AppRoute]:
        return [
            AppRoute("POST", "/sleep", self._set_asleep),
            AppRoute("POST", "/wake_up", self._set_asleep),
            AppRoute("GET", "/is_sleeping", partial(self._ask_all, "is_sleeping")),
            AppRoute("GET", "/pdlaunch/integrity", partial(self._ask_all, "ok")),
            AppRoute("POST", "/pdlaunch/restart", self._restart),
            AppRoute("POST", "/pdlaunch/drain", partial(self._drain, True)),
            AppRoute("POST", "/pdlaunch/undrain", partial(self._drain, False)),
            *(
                AppRoute("POST", f"/pdlaunch/{name}", partial(self._command, kind))
                for name, kind in COMMANDS.items()
            ),
            AppRoute("*", "/pdlaunch/engines/{engine}/{path:.*}", self._one_engine),
        ]

    async def _set_asleep(self, http: web.Request) -> web.Response:
        """Put engines to sleep (path ``/sleep``) or wake them up (``/wake_up``)."""
        sleeps = http.path == "/sleep"
        # Prefill engines sleep first, while decode engines can still pull their blocks. Decode
        # engines wake first: they shake hands with prefill engines when these wake up.
        engines = self._chosen(http, first="prefill" if sleeps else "decode")
        query = [(name, value) for name, value in http.query.items() if name != "engine"]
        outcomes = []
        for engine in engines:
            if engine.capabilities.kind != "vllm":
                outcomes.append(await self._ask(engine, "POST", http.path, query))
            else:
                command = fall_asleep if sleeps else wake_up
                outcomes.append(await _outcome(engine.name, command(self._state, engine, query)))
        awake = {each.engine for each in outcomes if each.answer.get("is_sleeping") is False}
        # Later requests must find these engines in the registry.
        if not await self._state.find(
            lambda: all(e.state != "sleeping" for e in self._pool.engines if e.name in awake),
            LISTED_TIMEOUT_S,
        ):
            message = "the engines are awake, but not yet in the registry"
            raise _unavailable(message, "not_listed_yet")
        return _together(outcomes)

    async def _ask_all(self, key: str, http: web.Request) -> web.Response:
        """Collect the engines' answers; ``key`` is true if it is true in all of them."""
        outcomes = [
            await self._ask(engine, "GET", http.path, timeout_s=ENGINE_CHECK_TIMEOUT_S)
            for engine in self._chosen(http)
        ]
        return _together(outcomes, **{key: all(each.answer.get(key, False) for each in outcomes)})

    async def _restart(self, http: web.Request) -> web.Response:
        # One after another, so that the others serve.
        names = _engines_named(http)
        return _together([await _outcome(name, self._restart_one(name)) for name in names])

    async def _restart_one(self, name: str) -> dict[str, Any]:
        begun = await self._supervisor.ask(Restart(question=0, name=name))
        if begun.error:
            raise _refusal(begun.error, begun.code)

        def successor() -> Engine | None:
            """Return the restarted engine once it is ready, drained or given up, else None."""
            for engine in self._pool.engines:
                is_new = engine.name == begun.engine and engine.processes[0] > begun.incarnation
                if is_new and (engine.ready or engine.state in ("failed", "draining")):
                    return engine
            return None

        found = await self._state.find(successor, CHANGE_TIMEOUT_S)
        if found is None:
            reason = f"does not serve {CHANGE_TIMEOUT_S:g} s after it was restarted; see its log"
            raise _unavailable(f"{begun.engine} {reason}", "not_ready")
        if found.state == "failed":
            text = f"{begun.engine} has failed: {found.entry.reason}"
            raise _unavailable(text, "engine_failed")
        return {"engine": begun.engine, "incarnation": found.processes[0]}

    async def _drain(self, is_drained: bool, http: web.Request) -> web.Response:
        """Withhold new work from engines and wait until they are idle, or give them work again."""
        names = _engines_named(http)
        try:
            timeout_s = msgspec.convert(http.query.get("timeout_s", "0"), Seconds, strict=False)
        except msgspec.ValidationError:
            given = http.query["timeout_s"][:100]
            message = f"timeout_s: {given!r} is not a number of seconds from 0 to 86400"
            raise RequestError(message, param="timeout_s", code="invalid_timeout") from None
        until_at = self._state.now() + timeout_s
        # Withhold work from all engines before waiting for the first one.
        outcomes = [await _outcome(name, self._set_drained(name, is_drained)) for name in names]
        for _, status, answer in outcomes if is_drained else ():
            if status == 200:
                answer["running"] = await self._pool.until_idle(answer["engine"], until_at)
        return _together(outcomes)

    async def _set_drained(self, name: str, is_drained: bool) -> dict[str, Any]:
        command = SetDrained(question=0, name=name, is_drained=is_drained)
        answer = await self._supervisor.ask(command)
        if answer.error:
            raise _refusal(answer.error, answer.code)
        # The supervisor sends the new registry before its answer, so later requests see the change.
        return {"engine": answer.engine, "is_drained": is_drained, "notes": answer.notes}

    async def _command(self, kind: type[Command], http: web.Request) -> web.Response:
        """Pass a command on to the supervisor and answer when it is done."""
        try:
            asked = msgspec.json.decode(await http.read(), type=dict[str, Any])
            command = msgspec.convert(asked | {"type": kind.__name__, "question": 0}, kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(str(error), code="invalid_change") from None
        running = {engine.name: engine.num_outstanding for engine in self._pool.engines}
        answer = await self._supervisor.ask(command)
        body = {"dry_run": asked.get("dry_run", False), "notes": answer.notes}
        if answer.change is not None:
            # How many requests run at the engines that stop, or would stop
            answer.change.stops = {name: running.get(name, 0) for name in answer.change.stops}
            body["change"] = answer.change
        if not answer.error:
            return json_response(body)
        refusal = _refusal(answer.error, answer.code)
        return json_response(body | error_body(refusal), status=refusal.status)

    async def _one_engine(self, http: web.Request) -> web.Response:
        (engine,) = self._named([http.match_info["engine"]])
        path = f"/{quote(http.match_info['path'])}"
        headers = {REQUEST_ID_HEADER: str(request_id_of(http))}
        status, body, content_type = await self._state.client.call(
            engine, http.method, path, list(http.query.items()), await http.read(), headers=headers
        )
        return web.Response(status=status, body=body, headers={"Content-Type": content_type})

    async def _ask(self, engine: Engine, *request: Any, timeout_s: float | None = None) -> Outcome:
        try:
            call = self._state.client.call(engine, *request, timeout_s=timeout_s)
            status, body, _ = await call
            return Outcome(engine.name, status, msgspec.json.decode(body, type=dict[str, Any]))
        except (OverloadedError, ValueError, RecursionError) as error:
            failure = _unavailable(str(error), "engine_failed")
            return Outcome(engine.name, failure.status, error_body(failure))

    def _chosen(self, http: web.Request, first: Role = "prefill") -> list[Engine]:
        """Return the queried engines, or all that have not failed; role ``first`` comes first."""
        names = http.query.getall("engine", [])
        others = [engine for engine in self._pool.engines if engine.state != "failed"]
        engines = self._named(names) if names else others
        return sorted(engines, key=lambda engine: (engine.role != first, engine.name))

    def _named(self, names: Iterable[str]) -> list[Engine]:
        known = {engine.name: engine for engine in self._pool.engines}
        if unknown := [name for name in names if name not in known]:
            there = ", ".join(known) or "none yet"
            message = f"there is no engine {unknown[0][:100]}; engines are: {there}"
            raise _refusal(message, "engine_not_found")
        return [known[name] for name in dict.fromkeys(names)]


def _engines_named(http: web.Request) -> list[str]:
    if not (names := http.query.getall("engine", [])):
        raise RequestError("name the engine: engine=NAME", param="engine", code="missing_engine")
    return list(dict.fromkeys(names))


def _refusal(message: str, code: RefusalCode) -> RequestError:
    return RequestError(message, param="engine", status=_STATUS[code], code=code)


async def _outcome(name: str, work: Awaitable[dict[str, Any]]) -> Outcome:
    try:
        return Outcome(name, 200, await work)
    except RequestError as error:
        return Outcome(name, error.status, error_body(error))


def _together(outcomes: Sequence[Outcome], **fields: Any) -> web.Response:
    """Join the outcomes in one answer, with status and error of the first that failed, if any."""
    failed = next((outcome for outcome in outcomes if outcome.status != 200), None)
    body = fields | {"engines": [{"engine": each.engine, **each.answer} for each in outcomes]}
    if failed is None:
        return json_response(body)
    return json_response(body | {"error": failed.answer.get("error")}, status=failed.status)


async def fall_asleep(state: RouterState, engine: Engine, query: Query) -> dict[str, Any]:
    """Put an engine of vLLM to sleep; return an answer of the form that native engines send."""
    options = {"level": "1", "mode": "wait"} | dict(query)
    # After level 2 vLLM wakes up without its weights, and answers nonsense.
    if options["level"] != "1" or options["mode"] not in ("wait", "refuse"):
        raise RequestError("vLLM sleeps only at level 1, mode wait or refuse", param="query")
    state.pool.hold(engine, "draining")
    is_asleep = False
    try:
        await _await_idle(state, engine, 0.0 if options["mode"] == "refuse" else IDLE_TIMEOUT_S)
        # vLLM waits for requests that came in the meantime from other clients than this router.
        is_asleep = await _command(state, engine, "/sleep", [("mode", "wait")]) == "sleeping"
    finally:
        if is_asleep:
            state.pool.hold(engine, "sleeping")
        else:
            state.pool.release(engine)
    # vLLM does not report how much memory it has freed.
    return {"is_sleeping": is_asleep, "num_bytes": 0}


async def wake_up(state: RouterState, engine: Engine, query: Query) -> dict[str, Any]:
    """Wake up an engine of vLLM, or its ``tags``."""
    is_awake = await _command(state, engine, "/wake_up", query) == "awake"
    if is_awake:
        state.pool.release(engine)
        # The engine's memory may have new addresses.
        for pair in state.pool.pairs:
            if engine.name in (pair.local, pair.peer):
                error = f"{engine.name} has slept"
                state.doubt(pair.local, pair.peer, pair.peer_incarnation, error)
    return {"is_sleeping": not is_awake, "num_bytes": 0}


async def _await_idle(state: RouterState, engine: Engine, timeout_s: float) -> None:
    """Wait until the engine runs nothing and leases no blocks. Raises RequestError."""
    until_at = state.now() + timeout_s
    while True:
        # The page of an error has no counts, which must not pass for an idle engine.
        page = await state.client.read(engine, "/metrics", ENGINE_CHECK_TIMEOUT_S)
        if page is None:
            raise _unavailable("/metrics does not answer 200", "engine_failed")
        if not engine.num_works and not is_vllm_busy(Counts(page.decode("utf-8", "replace"))):
            return
        if state.now() >= until_at:
            message = "requests run, or KV blocks are leased; mode=wait waits for them"
            raise RequestError(message, status=409, code="engine_busy")
        await asyncio.sleep(IDLE_POLL_S)


async def _command(state: RouterState, engine: Engine, path: str, query: Query) -> object:
    """Send vLLM a command; return the answer's ``status``. Raises RequestError, EngineFailure."""
    status, body, _ = await state.client.call(engine, "POST", path, query)
    if status == 404:
        message = "this engine cannot sleep: enable_sleep_mode is off"
        raise RequestError(message, code="sleep_mode_off")
    with contextlib.suppress(ValueError, RecursionError):
        if status == 200:
            return msgspec.json.decode(body, type=dict[str, Any]).get("status")
    raise _unavailable(f"{path} answered {status}: {body[:200]!r}", "engine_failed")


async def listen_at_admin_socket(app: web.Application, path: Path) -> web.AppRunner:
    """Listen at a Unix socket of mode 0600, so that clients cannot use up its connections."""
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        auto_decompress=False,
    )
    await runner.setup()
    # Rename the socket to ``path`` only when it listens. Until then the socket of an earlier router
    # stays there: commands wait at it, but would fail at once if there were no socket.
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Linux gives the file the mode of the socket, less the umask.
    os.fchmod(listener.fileno(), 0o600)
    listener.bind(str(new))
    await web.SockSite(runner, listener, backlog=SOCKET_BACKLOG).start()
    new.replace(path)
    return runner


def came_through_admin_socket(http: web.Request) -> bool:
    """Return whether the request came over the admin socket."""
    connection = None if http.transport is None else http.transport.get_extra_info("socket")
    return connection is not None and connection.family == socket.AF_UNIX
