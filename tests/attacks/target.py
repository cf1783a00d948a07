"""The deployment under attack: how it is started, asked and looked at, and which promises every
attack checks.
"""

import contextlib
import http.client
import json
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import psutil

from tests.attacks.verdict import Verdict
from tests.e2e.agreement import await_idle, engines_of
from tests.e2e.api import states
from tests.e2e.client import Api, Deployment, admin_api
from tests.e2e.conftest import clean_environ, launched
from tests.e2e.faults import SHORT_DEADLINES, lives
from tests.e2e.tiny_models import make_tiny_model
from tests.e2e.waiting import await_true

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
SMALL_BODY = {
    "prompt": "What do others notice?",
    "max_tokens": 4,
    "temperature": 0,
    "ignore_eos": True,
}
"""What bystanders ask."""
ENGINE_KEY = "attackers-know-this-one"
"""So that attacks get past the door of the engines; ``sockets`` tries without."""
VOCAB_SIZE = 49152
MAX_MODEL_LEN = 2048
MOST_GROWTH = 1.2
"""Of a process's resident memory, after an attack."""
CALM_S = 180.0
RESTART_S = 300.0


@dataclass(frozen=True)
class Answer:
    """What came back; ``status`` 0: nothing did, ``body`` says why."""

    status: int
    body: bytes
    seconds: float
    headers: Mapping[str, str] = field(default_factory=dict)

    def broken_promise(self) -> str | None:
        """What no request may lead to."""
        if self.status == 0:
            return f"a request is answered: {self.body.decode()}"
        if self.status >= 500 and not (self.status == 503 and "retry-after" in self.headers):
            return f"no 5xx but 503 with Retry-After: {self.status}"
        if b"Traceback (most recent" in self.body or b'File "/' in self.body:
            return "an answer shows no traceback"
        if self.status == 200 and (
            b":NaN" in self.body or b": NaN" in self.body or b"Infinity" in self.body
        ):
            return "an answer is JSON: NaN or Infinity"
        return None


class Target:
    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.router = deployment.url
        self.reference = ""
        """The answer to ``SMALL_BODY``, taken before any attack."""
        self.living: dict[str, psutil.Process] = {}
        self.urls: dict[str, str] = {}
        """Of the router and the engines."""
        self.look_again()

    def look_again(self) -> None:
        self.living = self.deployment.processes()
        engines = {engine["name"]: engine["url"] for engine in engines_of(Api(self.router))}
        self.urls = {"router": self.router, **engines}

    def send(
        self,
        who: str,
        path: str,
        body: bytes | None,
        *,
        method: str = "POST",
        key: str = ENGINE_KEY,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 300.0,
    ) -> Answer:
        """One request over a connection of its own; never raises for what the other side does."""
        address = urllib.parse.urlsplit(self.urls[who]).netloc
        own = {"Content-Type": "application/json"} if body is not None else {}
        if key and who != "router":
            own["Authorization"] = f"Bearer {key}"
        connection = http.client.HTTPConnection(address, timeout=timeout_s)
        start_s = time.monotonic()
        try:
            connection.request(method, path, body, own | dict(headers or {}))
            response = connection.getresponse()
            content = response.read()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, content, time.monotonic() - start_s, found)
        except (OSError, http.client.HTTPException) as error:
            return Answer(
                0, f"{type(error).__name__}: {error}"[:200].encode(), time.monotonic() - start_s
            )
        finally:
            connection.close()

    def ask(self, who: str, path: str, body: object, **options: Any) -> Answer:
        return self.send(who, path, json.dumps(body).encode(), **options)

    def judge(self, verdict: Verdict, answer: Answer, request: str) -> None:
        """Check what one answer promises, and that every process has survived it."""
        if promise := answer.broken_promise():
            verdict.broke(
                promise,
                f"{request} -> {answer.status} after {answer.seconds:.1f} s {answer.body[:200]!r}",
            )
        self.check_alive(verdict, request)

    def check_alive(self, verdict: Verdict, request: str) -> None:
        """No process died; waits until dead ones are replaced."""
        dead = [name for name, process in self.living.items() if not lives(process)]
        if dead:
            time.sleep(1)  # for the supervisor's words
            verdict.broke(
                f"no process dies: {', '.join(dead)}",
                f"{request}; {self.deployment.output()[-300:]!r}",
            )
            await_true(self._is_whole, lambda: self.deployment.output()[-600:], RESTART_S)
            self.look_again()

    def memory(self) -> dict[str, float]:
        found = {}
        for name, process in self.living.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                found[name] = process.memory_info().rss / 2**20
        return found

    def settle(
        self, verdict: Verdict, before: Mapping[str, float], how: str, spare_mib: float = 0.0
    ) -> None:
        """After an attack: processes live, engines hold nothing, memory is back; each within
        ``CALM_S``.
        """
        self.check_alive(verdict, how)
        for problem in await_idle(admin_api(self.router), timeout_s=CALM_S):
            verdict.broke("every block is given back", f"{how}: {problem}")
        deadline_s = time.monotonic() + CALM_S
        while True:
            now = self.memory()
            most = {name: (mib + spare_mib) * MOST_GROWTH for name, mib in before.items()}
            grown = [name for name in now if now[name] > most.get(name, inf)]
            if not grown or time.monotonic() > deadline_s:
                break
            time.sleep(0.2)
        told = {name: f"{name} {before[name]:.0f} -> {now.get(name, 0):.0f} MiB" for name in before}
        verdict.row("memory", *told.values())
        for name in grown:
            verdict.broke("memory comes back to within 20 %", f"{how}: {told[name]}")

    def _is_whole(self) -> bool:
        """Every engine that there was is ready again; one that restarts is not even listed."""
        assert self.deployment.process.poll() is None, self.deployment.output()[-600:]
        return states(self.router) == dict.fromkeys([*self.urls][1:], "ready")


def text_of(answer: Answer) -> str:
    """Of the first choice of a completion; empty when it failed."""
    return json.loads(answer.body)["choices"][0]["text"] if answer.status == 200 else ""


def warm_up(target: Target, num_requests: int) -> None:
    """Let every process allocate what it keeps anyway, so that growth afterwards is the
    attack's.
    """

    def ask(number: int) -> None:
        fields = {"stream": number % 2 == 0, "logprobs": 5, "n": 1 + number % 3}
        fields |= {"temperature": 0.7, "top_p": 0.9, "top_k": 40}
        body = {"prompt": f"{number} " + "warm up " * (number * 8), "max_tokens": 24, **fields}
        for who in target.urls:
            target.ask(who, COMPLETIONS, body)
            # The first chat loads the template engine.
            chat = {"messages": [{"role": "user", "content": body["prompt"]}], "max_tokens": 24}
            target.ask(who, CHAT, chat | fields | {"logprobs": True, "top_logprobs": 5})
        target.ask("router", "/tokenize", {"prompt": "warm up " * 1000})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(num_requests)))


@contextlib.contextmanager
def attacked(folder: Path, num_warm: int) -> Iterator[Target]:
    """One prefill and one decode engine, warmed up by so many requests, with a tiny random Llama of
    as many tokens as the demo model.
    """
    sizes = {"max_model_len": MAX_MODEL_LEN, "vocab_size": VOCAB_SIZE}
    model = make_tiny_model("llama", folder, **sizes)
    environ = clean_environ() | SHORT_DEADLINES | {"PDLAUNCH_ENGINE_API_KEY": ENGINE_KEY}
    with launched(model, "--kv-cache-memory", "64MiB", environ=environ) as deployment:
        target = Target(deployment)
        warm_up(target, num_warm)
        target.reference = text_of(target.ask("router", COMPLETIONS, SMALL_BODY))
        yield target
