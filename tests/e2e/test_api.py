"""The public API with real clients against the demo deployment."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from pdlaunch.client.deployment import Deployment
from tests.e2e.api import complete, get, metrics, post, total

QUESTION = [{"role": "user", "content": "Name three rivers in Europe."}]


@pytest.fixture
def client(demo: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_chat_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "smollm2", "messages": QUESTION, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(text) > 20
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage.model_copy(update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details})
    assert whole.usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason == "length"


def test_first_token_comes_from_prefill_and_blocks_over_nixl(demo: Deployment) -> None:
    before = total(metrics_of_engines(demo), "pdlaunch_kv_transfer_bytes_total")
    complete(demo.url, list(range(300, 400)), 4)
    assert total(metrics_of_engines(demo), "pdlaunch_kv_transfer_bytes_total") > before


def metrics_of_engines(demo: Deployment) -> dict[str, float]:
    return metrics(demo.url)


def test_choices_differ_and_seeds_repeat(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "smollm2",
        "prompt": "Once upon a time",
        "max_tokens": 12,
        "n": 3,
        "seed": 5,
        "logprobs": 2,
    }
    first, second = (client.completions.create(**fields) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in second.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    for choice in first.choices:
        assert len(choice.logprobs.tokens) == 12
        assert "".join(choice.logprobs.tokens) == choice.text
        assert all(len(top) in (2, 3) for top in choice.logprobs.top_logprobs)


def test_list_of_prompts(client: openai.OpenAI) -> None:
    alone = [
        client.completions.create(model="smollm2", prompt=prompt, max_tokens=6, temperature=0).choices[0].text
        for prompt in ("The sky is", "One, two, three,")
    ]
    both = client.completions.create(model="smollm2", prompt=["The sky is", "One, two, three,"], max_tokens=6, temperature=0)
    assert [choice.text for choice in both.choices] == alone
    assert both.usage.completion_tokens == 12


def test_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "smollm2", "messages": QUESTION, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**fields).choices[0].message.content
    stop = whole[10:14]
    stopped = client.chat.completions.create(**fields, stop=[stop]).choices[0]
    assert stopped.message.content == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"


def test_logprobs_of_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2", messages=QUESTION, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    for entry in content:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert len(entry.top_logprobs) == 3


def test_characters_of_several_tokens_stream_whole(client: openai.OpenAI) -> None:
    prompt = "🙂🙃🙂🙃🙂🙃🙂🙃"
    stream = client.completions.create(model="smollm2", prompt=prompt, max_tokens=16, temperature=0, stream=True)
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    whole = client.completions.create(model="smollm2", prompt=prompt, max_tokens=16, temperature=0).choices[0].text
    assert "".join(pieces) == whole
    assert not any("�" in piece for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"kv_transfer_params": {"do_remote_decode": True}}, "kv_transfer_params"),
        ({"best_of": 4}, "best_of"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias"),
    ],
)
def test_what_does_not_work_is_named(demo: Deployment, fields: dict[str, Any], param: str) -> None:
    status, body = post(demo.url, "/v1/completions", {"prompt": "x", "max_tokens": 2} | fields)
    assert status == 400
    assert param in body["error"]["param"]
    assert body["error"]["message"]


def test_too_long_prompt_names_both_numbers(demo: Deployment) -> None:
    status, body = post(demo.url, "/v1/completions", {"prompt": [5] * 9000, "max_tokens": 2})
    assert status == 400
    assert "9000" in body["error"]["message"]
    assert "8192" in body["error"]["message"]


def test_tokenize_and_back(demo: Deployment) -> None:
    _, tokens = post(demo.url, "/tokenize", {"prompt": "Hello, wörld"})
    _, text = post(demo.url, "/detokenize", {"tokens": tokens["tokens"]})
    assert text["prompt"] == "Hello, wörld"
    assert tokens["count"] == len(tokens["tokens"])


def test_models_health_and_request_id(demo: Deployment) -> None:
    assert json.loads(get(demo.url, "/v1/models"))["data"][0]["id"] == "smollm2"
    headers = subprocess.run(
        ["curl", "-sS", "-D", "-", "-o", "/dev/null", "-H", "X-Request-Id: my-id", "-H", "Content-Type: application/json"]
        + ["-d", '{"prompt": "x", "max_tokens": 1}', f"{demo.url}/v1/completions"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert "200" in headers.splitlines()[0]
    assert "x-request-id: my-id" in headers.lower()


def test_a_client_that_goes_away_frees_every_block(demo: Deployment) -> None:
    """While prefill computes, and while decode streams."""
    host, port = demo.url.removeprefix("http://").split(":")
    for num_events in (0, 5):
        body = json.dumps({"prompt": [7] * 700, "max_tokens": 400, "stream": True, "ignore_eos": True}).encode()
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            received = b""
            while received.count(b"data:") < num_events:
                received += connection.recv(65536)
        deadline_s = time.monotonic() + 30
        while not idle(demo) and time.monotonic() < deadline_s:
            time.sleep(0.2)
        assert idle(demo)


def idle(demo: Deployment) -> bool:
    samples = metrics(demo.url)
    names = ("pdlaunch_num_requests_running", "pdlaunch_num_requests_waiting", "pdlaunch_num_blocks_leased")
    return all(total(samples, name) == 0 for name in names)
