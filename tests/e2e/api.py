"""Small calls that the end-to-end tests share."""

import json
import operator
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from tests.e2e.agreement import await_idle, engines_of
from tests.e2e.client import Api, admin_api
from tests.e2e.waiting import await_true


def greedy_body(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def complete(url: str | Api, prompt: list[int], num_tokens: int, **fields: Any) -> list[int]:
    """Token ids of a greedy completion of exactly ``num_tokens`` by a router or one engine."""
    api = url if isinstance(url, Api) else Api(url)
    status, answer = api.post("/v1/completions", greedy_body(prompt, num_tokens) | fields)
    assert status == 200, answer
    return answer["choices"][0]["token_ids"]


def complete_all(
    url: str, prompts: list[list[int]], num_tokens: int, concurrency: int, **fields: Any
) -> list[list[int]]:
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda prompt: complete(url, prompt, num_tokens, **fields), prompts))


@contextmanager
def clients(count: int, ask: Callable[[int, int], object]) -> Iterator[list[int]]:
    """Clients ask again and again until the block ends; ``ask`` gets a client's number, and how
    many answers it has. Yield these counts.
    """
    ends, num_answers = threading.Event(), [0] * count

    def work(client: int) -> None:
        while not ends.is_set():
            ask(client, num_answers[client])
            num_answers[client] += 1

    with ThreadPoolExecutor(count) as pool:
        works = [pool.submit(work, client) for client in range(count)]
        try:
            yield num_answers
        finally:
            ends.set()
        for each in works:
            each.result()


def await_answers(num_answers: list[int]) -> None:
    before = num_answers.copy()
    await_true(lambda: all(map(operator.gt, num_answers, before)), "each client has an answer")


def post_text(url: str, path: str, body: dict[str, Any], **headers: str) -> str:
    """The whole text of an answer, such as a stream of events."""
    headers |= {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        return str(response.read().decode())


@contextmanager
def streamed(
    url: str, prompt: list[int], num_tokens: int, **fields: Any
) -> Iterator[Iterator[int]]:
    """Token ids of a greedy completion, as they arrive."""
    body = greedy_body(prompt, num_tokens) | {"stream": True} | fields
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        response = urllib.request.urlopen(request, timeout=300)
    except urllib.error.HTTPError as error:
        with error:
            pytest.fail(f"{error.code}: {error.read().decode()}")
    with response:
        yield _token_ids(response)


def _token_ids(lines: Iterable[bytes]) -> Iterator[int]:
    for line in lines:
        if line.startswith(b"data:") and line.strip() != b"data: [DONE]":
            event = json.loads(line[5:])
            assert "error" not in event, event
            for choice in event["choices"]:
                yield from choice["token_ids"]


def engine_apis(url: str, role: str | None = None) -> list[Api]:
    admin = admin_api(url)
    return [
        admin.engine(engine["name"])
        for engine in engines_of(admin)
        if role in (None, engine["role"])
    ]


def count_now(api: Api, name: str) -> float:
    """The present value of a counter of ``EngineStats``, from an engine's rank 0; 0 while the
    engine has no rank.
    """
    return float(json.loads(api.get("/pdlaunch/integrity")[1]).get("stats", {}).get(name, 0))


def total_now(url: str, name: str) -> float:
    return sum(count_now(api, name) for api in engine_apis(url))


def requests_in_flight(url: str) -> float:
    return Api(url).metrics()["pdlaunch_router_requests_in_flight"]


def states(url: str) -> dict[str, str]:
    """Engine -> state; engines without a process are not listed."""
    return {engine["name"]: engine["state"] for engine in engines_of(admin_api(url))}


def await_ready(url: str, num_engines: int = 2) -> None:
    await_true(
        lambda: list(states(url).values()) == ["ready"] * num_engines, "all engines are ready"
    )


def idle(url: str) -> bool:
    """True if no engine has a request, or a leased or quarantined block."""
    return not await_idle(admin_api(url), timeout_s=0)
