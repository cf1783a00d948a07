"""One prefill and one decode engine of vLLM behind the router: the real programs."""

import contextlib
import ipaddress
import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from openai import APIError, OpenAI
from typer.testing import CliRunner

from pdlaunch.cli.app import build_app
from pdlaunch.cli.doctor import MEASURABLE_BYTES
from pdlaunch.http.engine_calls import Counts
from tests.e2e.agreement import differences
from tests.e2e.api import complete, requests_in_flight, streamed
from tests.e2e.client import Api, Deployment, admin_api
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


def assert_pulled(url: str, alone: Api, *seeds: int) -> None:
    """Tokens are those of one engine, and their KV bytes have moved."""
    for seed in seeds:
        num_bytes = bytes_read(url)
        told = complete(url, prompt_of(seed), NUM_TOKENS)
        assert bytes_read(url) > num_bytes
        assert told == complete(alone, prompt_of(seed), NUM_TOKENS, model="smollm2")


def await_healed(
    url: str,
    name: str,
    draw: Callable[[], list[int]] = lambda: prompt_of(random.randrange(2**31)),
) -> None:
    """Wait until an engine has died and is back, and KV blocks of prompts that were drawn move."""
    await_true(lambda: states(url).get(name) != "ready", "its death is seen")
    await_true(lambda: states(url).get(name) == "ready", f"{name} is back", 600)
    await_moving(url, draw)


def await_moving(url: str, draw: Callable[[], list[int]]) -> None:
    def moves() -> bool:
        num_bytes = bytes_read(url)
        complete(url, draw(), 2)
        return bytes_read(url) > num_bytes

    await_true(moves, "KV blocks move again", 300)


def test_tokens_are_those_of_one_engine_and_kv_bytes_have_moved(pair: Deployment) -> None:
    assert_pulled(pair.url, admin_api(pair.url).engine("prefill-0"), 0, 1, 2)


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
    assert_pulled(pair.url, admin_api(pair.url).engine("prefill-0"), 35)


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


def test_http_and_rpc_are_at_sockets_of_the_launch(pair: Deployment) -> None:
    """vLLM's own HTTP server would listen on a port, and its processes would meet in /tmp."""
    supervisor = psutil.Process(pair.process.pid)
    ports = {
        connection.laddr.port: process.name()
        for process in supervisor.children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and not ipaddress.ip_address(connection.laddr.ip).is_loopback
    }
    assert not ports, "listens to other hosts"
    _, status = Api(pair.url).get_object("/pdlaunch/status")
    urls = [engine["url"] for engine in status["engines"]]
    assert len(urls) == 2
    assert all(url.startswith("unix:") for url in urls)


def test_a_pair_of_vllm_is_examined_and_proven(pair: Deployment) -> None:
    # A speed is told from 64 MiB on; each prompt has some 20.
    seeds = iter(range(300, 310))
    while bytes_read(pair.url) < MEASURABLE_BYTES:
        assert complete(pair.url, prompt_of(next(seeds), 450), 2)
    _, status = Api(pair.url).get_object("/pdlaunch/status")
    urls = {engine["role"]: engine["url"] for engine in status["engines"]}
    flags = [f"--{role}={url}" for role, url in urls.items()]
    arguments = ["doctor", *flags, "--exact", "--format", "json"]
    result = CliRunner().invoke(build_app(arguments), arguments)
    assert result.exit_code == 0, result.output
    deployment = json.loads(result.stdout)["resolved"]["deployment"]
    assert [engine["role"] for engine in deployment["engines"]] == ["prefill", "decode"]
    assert all(engine["version"].startswith("0.") for engine in deployment["engines"])
    assert all(engine["block_size"] == "128" for engine in deployment["engines"])
    decode = deployment["engines"][1]
    assert decode["gigabytes_per_s"] > 0
    (proven,) = deployment["pairs"]
    assert proven["num_bytes"] > 0
    assert not proven["problem"]


def test_a_pair_answers_as_one_engine_alone(pair: Deployment) -> None:
    assert differences(pair.url) == []


def test_an_engine_that_is_killed_comes_back_and_is_proven_again(pair: Deployment) -> None:
    name, prompt = "decode-0", prompt_of(30)
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

    await_healed(pair.url, name)
    assert complete(pair.url, prompt, NUM_TOKENS) == expected
