"""One prefill and one decode engine of vLLM behind the router: the real programs."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq
from openai import APIError, OpenAI

from pdlaunch.http.watch.engine_api import Counts
from pdlaunch.launch.client.admin import admin_api
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment
from tests.e2e.agreement import differences
from tests.e2e.api import complete, requests_in_flight, streamed
from tests.e2e.waiting import await_true
from tests.vllm.kv_memory import BYTES_READ, EXPIRED, engine_of, total

NUM_TOKENS = 12
RUNNING = "vllm:num_requests_running"


def prompt_of(seed: int, length: int = 150) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(100, 40_000) for _ in range(length)]


def bytes_read(url: str) -> float:
    return total(Api(url).metrics(), BYTES_READ)


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
    decode = admin_api(pair.url).engine("decode-0")
    num_prompt_tokens = decode.metrics()["vllm:prompt_tokens_total"]
    with streamed(pair.url, prompt, NUM_TOKENS) as stream:
        tokens = list(stream)
    # Decode continued behind the token that prefill had drawn.
    num_prompt_tokens += len(prompt) + 1
    await_true(
        lambda: decode.metrics()["vllm:prompt_tokens_total"] == num_prompt_tokens, "decode's count"
    )
    assert tokens == complete(pair.url, prompt, NUM_TOKENS)
    # The second one's prompt was in prefill's cache. vLLM computes at least the last token.
    _, told = Api(pair.url).get_object("/pdlaunch/requests?last=1")
    size = Counts(decode.get("/metrics")[1]).label("vllm:cache_config_info", "block_size")
    num_blocks = (len(prompt) - 1) // int(size or 0)
    assert told["requests"][0]["cached_tokens"] == num_blocks * int(size or 0) > 0
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
    asked = {"model": "smollm2", "input": ask["messages"], "temperature": 0}
    said = client.responses.create(**asked, max_output_tokens=20)  # type: ignore[call-overload]
    assert said.output_text == text, "/v1/responses reaches vLLM as a chat"


COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
ASK = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Which colour has grass in the summer? " * 5}],
    "max_tokens": 40,
    "temperature": 0,
}


PAINT = {"name": "paint", "parameters": COLOURS}
FIELDS: dict[str, dict[str, Any]] = {
    "structured": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": COLOURS}}
    },
    "tools": {
        "tools": [{"type": "function", "function": PAINT}],
        "tool_choice": {"type": "function", "function": {"name": "paint"}},
    },
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_structured_output_and_tools_pass(pair: Deployment, fields: dict[str, Any]) -> None:
    def message(api: Api) -> dict[str, Any]:
        status, answer = api.post("/v1/chat/completions", ASK | fields)
        assert status == 200, answer
        (choice,) = answer["choices"]
        found: dict[str, Any] = choice["message"]
        for call in found.get("tool_calls") or []:
            del call["id"]  # drawn anew each time
        return found

    said = message(Api(pair.url))
    assert said == message(admin_api(pair.url).engine("prefill-0"))
    if "tools" in fields:
        return
    assert json.loads(said["content"])["colour"] in ("red", "green")
    client = OpenAI(base_url=pair.url + "/v1", api_key="none")
    parts = client.chat.completions.create(**ASK, **fields, stream=True)  # type: ignore[call-overload]
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == said["content"]


def test_several_choices_come_from_one_engine(pair: Deployment) -> None:
    before = bytes_read(pair.url)
    body = {"prompt": prompt_of(50), "max_tokens": 4, "n": 3, "temperature": 0.5, "seed": 7}
    texts = []
    for api in (Api(pair.url), admin_api(pair.url).engine("prefill-0")):
        status, answer = api.post("/v1/completions", body)
        assert status == 200, answer
        texts.append([choice["text"] for choice in answer["choices"]])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 3
    assert bytes_read(pair.url) == before


def test_a_lease_that_nobody_pulls_is_given_back_at_once(pair: Deployment) -> None:
    """Prefill has computed the prompt before anybody knows that the answer would be too long."""
    body = {"prompt": "Grass is green. " * 60, "max_tokens": 400}
    status, answer = Api(pair.url).post("/v1/completions", body)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert Api(pair.url).metrics()["pdlaunch_router_releases_total"] == 1
    # The lease itself would last 30 s.
    prefill = admin_api(pair.url).engine("prefill-0")
    await_true(lambda: prefill.metrics()["vllm:kv_cache_usage_perc"] == 0, "it is freed", 20)


def test_status_has_kinds_versions_and_pairs_and_nothing_was_recomputed(pair: Deployment) -> None:
    _, status = Api(pair.url).get_object("/pdlaunch/status")
    assert {engine["kind"] for engine in status["engines"]} == {"vllm"}
    assert all(engine["version"][0].isdigit() for engine in status["engines"])
    assert [(each["prefill"], each["decode"]) for each in status["pairs"]] == [
        ("prefill-0", "decode-0")
    ]
    before = Api(pair.url).metrics()["pdlaunch_router_silent_recomputes_total"]
    for seed in range(60, 63):
        complete(pair.url, prompt_of(seed), 2)
    assert Api(pair.url).metrics()["pdlaunch_router_silent_recomputes_total"] == before


def test_a_client_that_leaves_frees_both_engines(pair: Deployment) -> None:
    with streamed(pair.url, prompt_of(20), 300) as tokens:
        assert next(tokens) is not None
    await_true(lambda: is_idle(pair), "both engines are idle")


def test_a_client_that_leaves_during_prefill_leaves_no_lease(pair: Deployment) -> None:
    """Decode alone frees prefill's blocks before their lease of 30 s ends."""
    num_expired = total(Api(pair.url).metrics(), EXPIRED)
    with leaving(pair.url, prompt_of(21, 450)):
        # vLLM counts what runs after each step, and the prompt takes one.
        await_true(lambda: requests_in_flight(pair.url) > 0, "the router has it")
    await_true(lambda: is_idle(pair), "nothing is leased")
    assert total(Api(pair.url).metrics(), EXPIRED) == num_expired


def test_clients_that_leave_at_any_moment_leave_no_block_leased(pair: Deployment) -> None:
    """If a client leaves just as vLLM ends its prompt, nobody learns of the lease: it expires."""
    for seed, delay_s in enumerate((0, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.6), start=22):
        with leaving(pair.url, prompt_of(seed, 300)):
            time.sleep(delay_s)
    await_true(lambda: not requests_in_flight(pair.url) and is_idle(pair), "nothing is leased")
    prompt, num_bytes = prompt_of(35, 300), bytes_read(pair.url)
    told = complete(pair.url, prompt, NUM_TOKENS)
    assert bytes_read(pair.url) > num_bytes
    alone = admin_api(pair.url).engine("prefill-0")
    assert told == complete(alone, prompt, NUM_TOKENS, model="smollm2")


@contextlib.contextmanager
def leaving(url: str, prompt: list[int]) -> Iterator[None]:
    """Ask for an answer, and leave at the end of the block."""
    body = json.dumps({"prompt": prompt, "max_tokens": 50}).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        yield


def is_idle(pair: Deployment) -> bool:
    metrics = Api(pair.url).metrics()
    return not metrics[RUNNING] and not metrics["vllm:kv_cache_usage_perc"]


def test_kv_events_are_published_at_a_socket_of_the_launch(pair: Deployment) -> None:
    _, status = Api(pair.url).get_object("/pdlaunch/status")
    (url,) = (each["url"] for each in status["engines"] if each["name"] == "prefill-0")
    endpoint = Path(url.removeprefix("unix:")).with_suffix(".inproc")
    assert endpoint.is_socket()
    assert endpoint.parent.stat().st_mode & 0o777 == 0o700
    with zmq.Context() as context, context.socket(zmq.SUB) as events:
        events.setsockopt(zmq.LINGER, 0)
        events.setsockopt(zmq.RCVTIMEO, 60_000)
        events.subscribe(b"")
        events.connect(f"ipc://{endpoint}")
        told: list[bytes] = []
        until_at = time.monotonic() + 180
        # A subscriber hears of what comes after it is connected.
        while not told and time.monotonic() < until_at:
            complete(pair.url, prompt_of(time.monotonic_ns(), 300), 2)
            if events.poll(2_000):
                told = events.recv_multipart()
    batch = msgspec.msgpack.decode(told[-1])
    assert "BlockStored" in {event["type"] for event in batch[1]}


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


def test_a_pair_answers_as_one_engine_alone(pair: Deployment) -> None:
    assert differences(pair.url) == []


@pytest.mark.parametrize("name", ["decode-0"])
def test_an_engine_that_is_killed_comes_back_and_is_proven_again(
    pair: Deployment, name: str
) -> None:
    prompt = prompt_of(30)
    expected = complete(pair.url, prompt, NUM_TOKENS)
    engine = engine_of(pair.processes()[name])
    client = OpenAI(base_url=pair.url + "/v1", api_key="none", max_retries=0)
    # Without ignore_eos, this answer would end before the kill on a fast machine.
    chat = ASK | {"max_tokens": 150, "extra_body": {"ignore_eos": True}}
    unbroken = client.chat.completions.create(**chat)  # type: ignore[call-overload]
    seeded = client.completions.create(
        model="smollm2", prompt=prompt_of(31), max_tokens=200, seed=5, stream=True
    )
    next(seeded)
    broken = client.chat.completions.create(**chat, stream=True)  # type: ignore[call-overload]
    texts = [next(broken).choices[0].delta.content or "" for _ in range(8)]
    engine.kill()
    # The prefill engine goes on with the stream and answers alone meanwhile.
    texts += [part.choices[0].delta.content or "" for part in broken if part.choices]
    assert "".join(texts) == unbroken.choices[0].message.content
    assert complete(pair.url, prompt, NUM_TOKENS) == expected
    with pytest.raises(APIError, match="seed"):
        list(seeded)
    counts = Api(pair.url).metrics()
    assert counts["pdlaunch_router_migrations_total"] == 1
    assert counts["pdlaunch_router_lost_streams_total"] == 1

    await_true(lambda: states(pair.url).get(name) != "ready", "its death is seen")
    await_true(lambda: states(pair.url).get(name) == "ready", "it is back", 600)
    deadline_at = time.monotonic() + 300
    while time.monotonic() < deadline_at:
        before = bytes_read(pair.url)
        assert complete(pair.url, prompt_of(random.randrange(2**31)), 2)
        if bytes_read(pair.url) > before:
            break
    else:
        pytest.fail("no KV byte moves any more")
    assert complete(pair.url, prompt, NUM_TOKENS) == expected


@pytest.mark.vllm_long
def test_files_that_change_under_a_running_engine_stop_its_next_start(
    pair: Deployment, model: Path
) -> None:
    prompt = prompt_of(36)
    expected = complete(pair.url, prompt, NUM_TOKENS)
    defaults = model / "generation_config.json"
    kept = defaults.read_text()
    defaults.write_text(json.dumps(json.loads(kept) | {"temperature": 2.0}))
    engine_of(pair.processes()["decode-0"]).kill()
    said = f"the model has changed since this launch began: {defaults.name} (SHA-256 "

    def events() -> str:
        return json.dumps(Api(pair.url).get_object("/pdlaunch/status")[1]["events"])

    try:
        await_true(lambda: said in events(), "status names the file", 600)
        await_true(lambda: said in pair.output(), "the terminal names the file")
        assert states(pair.url).get("decode-0") != "ready"
        assert complete(pair.url, prompt, NUM_TOKENS) == expected
    finally:
        defaults.write_text(kept)
    await_true(lambda: states(pair.url).get("decode-0") == "ready", "it is back", 600)
    assert complete(pair.url, prompt, NUM_TOKENS) == expected
