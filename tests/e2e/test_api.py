"""The public API with real clients against the demo deployment."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.api import complete, idle, post_text, total_now
from tests.e2e.client import Api, Deployment
from tests.e2e.waiting import await_true

QUESTION = [{"role": "user", "content": "Name three rivers in Europe."}]
GREEDY: dict[str, Any] = {"model": "smollm2", "max_tokens": 24, "temperature": 0}


@pytest.fixture
def client(demo: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_chat_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    fields = GREEDY | {"messages": QUESTION}
    whole = client.chat.completions.create(**fields)
    chunks = list(
        client.chat.completions.create(
            **fields, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(text) > 20
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert whole.usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1
    assert (
        [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]
        == whole.choices[0].finish_reason
        == "length"
    )


def test_the_example_streams_a_chat_from_another_port(
    demo: Deployment, client: openai.OpenAI
) -> None:
    command = [sys.executable, "examples/chat.py", demo.url]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    asked = client.chat.completions.create(**GREEDY | {"messages": QUESTION, "max_tokens": 60})
    assert done.stdout == f"{asked.choices[0].message.content}\n"


def test_blocks_of_the_prompt_are_pulled_not_computed_twice(demo: Deployment) -> None:
    before = total_now(demo.url, "kv_transfer_bytes")
    complete(demo.url, list(range(300, 400)), 4)
    # 7 blocks of 16 tokens: 30 layers, K and V, 3 heads of 64 float32.
    assert total_now(demo.url, "kv_transfer_bytes") - before == 7 * 16 * 30 * 2 * 3 * 64 * 4


def test_choices_differ_and_seeds_repeat(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 12}
    fields |= {"n": 3, "seed": 5, "logprobs": 2}
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
    prompts = ["The sky is", "One, two, three,"]
    fields = GREEDY | {"max_tokens": 6}
    alone = [client.completions.create(**fields, prompt=prompt).choices[0] for prompt in prompts]
    both = client.completions.create(**fields, prompt=prompts)
    assert [choice.text for choice in both.choices] == [choice.text for choice in alone]
    assert both.usage.completion_tokens == 12


def test_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    fields = GREEDY | {"messages": QUESTION}
    whole = client.chat.completions.create(**fields).choices[0].message.content
    stop = whole[10:14]
    stopped = client.chat.completions.create(**fields, stop=[stop]).choices[0]
    assert stopped.message.content == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"


def test_logprobs_of_chat(client: openai.OpenAI) -> None:
    fields = GREEDY | {"messages": QUESTION, "max_tokens": 5, "logprobs": True, "top_logprobs": 3}
    content = client.chat.completions.create(**fields).choices[0].logprobs.content
    assert len(content) == 5
    for entry in content:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert len(entry.top_logprobs) == 3


def test_characters_of_several_tokens_stream_whole(client: openai.OpenAI) -> None:
    fields = GREEDY | {"prompt": "🙂🙃🙂🙃🙂🙃🙂🙃", "max_tokens": 16}
    stream = client.completions.create(**fields, stream=True)
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert "".join(pieces) == client.completions.create(**fields).choices[0].text
    assert not any("�" in piece for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"kv_transfer_params": {"do_remote_decode": True}}, "kv_transfer_params"),
        ({"best_of": 4}, "best_of"),
        ({"guided_json": {"if": {}}}, "guided_json"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias"),
    ],
)
def test_what_does_not_work_is_named(demo: Deployment, fields: dict[str, Any], param: str) -> None:
    status, body = Api(demo.url).post("/v1/completions", {"prompt": "x", "max_tokens": 2} | fields)
    assert status == 400
    assert param in body["error"]["param"]
    assert body["error"]["message"]


def test_too_long_prompt_names_both_numbers(demo: Deployment) -> None:
    card = json.loads(Api(demo.url).get("/v1/models")[1])["data"][0]
    status, body = Api(demo.url).post("/v1/completions", {"prompt": [5] * 9000, "max_tokens": 2})
    assert status == 400
    assert "9000" in body["error"]["message"]
    assert str(card["max_model_len"]) in body["error"]["message"]


def test_tokenize_and_back(demo: Deployment) -> None:
    _, tokens = Api(demo.url).post("/tokenize", {"prompt": "Hello, wörld"})
    _, text = Api(demo.url).post("/detokenize", {"tokens": tokens["tokens"]})
    assert text["prompt"] == "Hello, wörld"
    assert tokens["count"] == len(tokens["tokens"])


def test_models_health_and_request_id(demo: Deployment) -> None:
    assert json.loads(Api(demo.url).get("/v1/models")[1])["data"][0]["id"] == "smollm2"
    body = '{"prompt": "x", "max_tokens": 1}'
    command = ["curl", "-sS", "-D", "-", "-o", "/dev/null", "-H", "X-Request-Id: my-id"]
    command += ["--json", body, f"{demo.url}/v1/completions"]
    headers = subprocess.check_output(command, text=True, timeout=60)
    assert "200" in headers.splitlines()[0]
    assert "x-request-id: my-id" in headers.lower()


VOWELS = ["a", "e", "i", "o", "u"]


@pytest.mark.parametrize("ending", [{}, {"stream": True}, {"stop": VOWELS, "min_tokens": 3}])
def test_the_next_scrape_has_what_the_answer_counts(
    demo: Deployment, ending: dict[str, Any]
) -> None:
    """Only the server finds a stop string: rank 0 does not report that end."""
    api = Api(demo.url)
    names = {
        "router_request_success": 1,
        "router_e2e_request_latency_seconds_count": 1,
        "request_success": 2,
        "e2e_request_latency_seconds_count": 2,
        "kv_transfers": 1,
    }
    for number in range(2):
        before = api.metrics()
        prompt = f"{number} {ending}" + " and so on, one step after the other" * 3
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        answer = post_text(demo.url, "/v1/completions", body | ending)
        assert ('"finish_reason":"stop"' in answer) == ("stop" in ending)
        after = api.metrics()
        changed = {
            name.removeprefix("pdlaunch_").removesuffix("_total"): after[name] - before.get(name, 0)
            for name in after
        }
        assert {name: changed[name] for name in names} == names
        assert changed["prefix_cache_queries"] == 2 * changed["router_prompt_tokens"] > 32
        assert changed["sampled_tokens"] >= changed["router_generation_tokens"] > 2


def test_a_client_that_goes_away_frees_every_block(demo: Deployment) -> None:
    """The client leaves while prefill computes, and while decode streams."""
    host, port = demo.url.removeprefix("http://").split(":")
    for num_events in (0, 5):
        fields = {"prompt": [7] * 700, "max_tokens": 400, "stream": True, "ignore_eos": True}
        body = json.dumps(fields).encode()
        head = f"Host: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            request = f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n"
            connection.sendall(request.encode() + body)
            received = b""
            while received.count(b"data:") < num_events:
                received += connection.recv(65536)
        await_true(lambda: idle(demo.url), "every block is free")
