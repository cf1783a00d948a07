"""One prefill and one decode engine of vLLM behind the router: the real programs."""

from __future__ import annotations

import random
import signal
import time

import psutil
import pytest
from openai import OpenAI

from pdlaunch.client.admin import admin_api
from pdlaunch.client.api import Api
from pdlaunch.client.deployment import Deployment
from tests.e2e.api import complete, streamed
from tests.e2e.waiting import await_true

NUM_TOKENS = 12
BYTES_READ = "vllm:nixl_bytes_transferred_sum"


def prompt_of(seed: int, length: int = 150) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(100, 40_000) for _ in range(length)]


def bytes_read(url: str) -> float:
    return Api(url).metrics()[BYTES_READ]


def states(url: str) -> dict[str, str]:
    _, status = Api(url).get_object("/pdlaunch/status")
    return {engine["name"]: engine["state"] for engine in status["engines"]}


def test_tokens_are_those_of_one_engine_and_kv_bytes_have_moved(pair: Deployment) -> None:
    alone = admin_api(pair.url).engine("prefill-0")
    for seed in range(3):
        prompt = prompt_of(seed)
        before = bytes_read(pair.url)
        tokens = complete(pair.url, prompt, NUM_TOKENS)
        assert bytes_read(pair.url) > before
        assert tokens == complete(alone, prompt, NUM_TOKENS, model="smollm2")


def test_streams_and_chats(pair: Deployment) -> None:
    prompt = prompt_of(10)
    with streamed(pair.url, prompt, NUM_TOKENS) as tokens:
        assert list(tokens) == complete(pair.url, prompt, NUM_TOKENS)
    client = OpenAI(base_url=pair.url + "/v1", api_key="none")
    ask = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Name three colours. " * 10}],
        "max_tokens": 20,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**ask)  # type: ignore[call-overload]
    parts = client.chat.completions.create(**ask, stream=True)  # type: ignore[call-overload]
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content != ""
    assert 0 < whole.usage.completion_tokens <= 20


def test_a_client_that_leaves_frees_both_engines(pair: Deployment) -> None:
    with streamed(pair.url, prompt_of(20), 300) as tokens:
        assert next(tokens) is not None

    def idle() -> bool:
        return Api(pair.url).metrics()["vllm:num_requests_running"] == 0

    await_true(idle, "both engines are idle", 60)


def test_http_and_rpc_are_at_sockets_of_the_launch(pair: Deployment) -> None:
    """vLLM's own HTTP server would listen on a port, and its processes would meet in /tmp."""
    supervisor = psutil.Process(pair.process.pid)
    ports = {
        connection.laddr.port: process.name()
        for process in supervisor.children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip in ("0.0.0.0", "::")
    }
    assert not ports, "listens on every address"
    _, status = Api(pair.url).get_object("/pdlaunch/status")
    urls = [engine["url"] for engine in status["engines"]]
    assert len(urls) == 2
    assert all(url.startswith("unix:") for url in urls)


@pytest.mark.parametrize("name", ["decode-0"])
def test_an_engine_that_is_killed_comes_back_and_is_proven_again(
    pair: Deployment, name: str
) -> None:
    prompt = prompt_of(30)
    expected = complete(pair.url, prompt, NUM_TOKENS)
    sidecar = pair.processes()[name]
    (engine,) = [child for child in sidecar.children() if "serve" in child.cmdline()]
    engine.send_signal(signal.SIGKILL)
    # The prefill engine answers alone meanwhile.
    assert complete(pair.url, prompt, NUM_TOKENS) == expected

    await_true(lambda: states(pair.url)[name] != "ready", "its death is seen", 30)
    await_true(lambda: states(pair.url)[name] == "ready", "it is back", 600)
    deadline_at = time.monotonic() + 120
    while time.monotonic() < deadline_at:
        before = bytes_read(pair.url)
        assert complete(pair.url, prompt_of(random.randrange(2**31)), 2)
        if bytes_read(pair.url) > before:
            break
    else:
        pytest.fail("no KV byte moves any more")
    assert complete(pair.url, prompt, NUM_TOKENS) == expected
