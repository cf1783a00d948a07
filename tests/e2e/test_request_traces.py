"""The records of a request in a real launch: its trace, its line, the logs of its engines."""

import json
import random
import re
from typing import Any

import msgspec
import pytest

from pdlaunch.http.headers import ROUTE_HEADER, WANTS_PAIR
from pdlaunch.launch.client.api import read_trace, reading_api
from pdlaunch.protocol.status import RequestTrace
from tests.e2e.api import post_text
from tests.e2e.client import Api, Deployment
from tests.e2e.secrecy import places_of, places_of_ids, told_by
from tests.e2e.test_scale import run
from tests.e2e.waiting import await_true


def post(url: str, body: dict[str, Any], request_id: str) -> None:
    api = Api(url, headers={"X-Request-Id": request_id, ROUTE_HEADER: WANTS_PAIR})
    assert api.post("/v1/completions", body)[0] == 200


def ended(api: Api, request_id: str) -> RequestTrace:
    """Return the trace of an ended request. The client may see the end before the router does."""
    await_true(lambda: read_trace(api, request_id).state == "done", "the request has ended")
    return read_trace(api, request_id)


@pytest.fixture(scope="module")
def through_a_pair(demo: Deployment) -> RequestTrace:
    """The trace of a request through a pair, with an id that is hard to display."""
    random_token = random.Random("a prompt to trace").randrange
    prompt = [random_token(1000, 9000) for _ in range(300)]
    request_id = "[red]trace/x"
    post(demo.url, {"prompt": prompt, "max_tokens": 8, "ignore_eos": True}, request_id)
    return ended(reading_api(demo.url, None), request_id)


def test_every_process_tells_its_part(through_a_pair: RequestTrace) -> None:
    found: dict[str, set[str]] = {}
    for span in through_a_pair.spans:
        found.setdefault(span.process, set()).add(span.name)
    assert found["router"] >= {"request", "receive", "route", "first token", "tokens", "end"}
    assert found["prefill-0"] >= {"receive", "tokenize"}
    assert found["decode-0"] >= {"receive", "tokenize"}
    assert found["prefill-0/rank-0"] >= {"queue", "seated", "prefill", "lease granted", "end"}
    assert found["decode-0/rank-0"] >= {"lease", "read", "checksums", "pull", "decode", "end"}
    assert through_a_pair.verified is True
    assert through_a_pair.remote_tokens
    assert (through_a_pair.prompt_tokens, through_a_pair.output_tokens) == (300, 8)


def test_whole_blocks_of_a_prompt_that_comes_again_are_cached(demo: Deployment) -> None:
    prompt = random.Random("again").choices(range(1000, 9000), k=300)
    body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True}
    for request_id, num_cached in (("first", 0), ("again", 288)):
        post(demo.url, body, request_id)
        assert ended(reading_api(demo.url, None), request_id).cached_tokens == num_cached


def test_their_clocks_are_brought_together(through_a_pair: RequestTrace) -> None:
    """An engine's spans are within the time in which the router waited for the engine."""
    legs = [s for s in through_a_pair.spans if "clock_error_ms" in s.attributes]
    error_ms = max(float(leg.attributes["clock_error_ms"] or 0) for leg in legs)
    whole = through_a_pair.spans[0]
    for span in through_a_pair.spans:
        assert -error_ms <= span.start_ms <= span.end_ms <= whole.end_ms + error_ms + 1
    for leg in legs:
        engine = leg.name.partition(" at ")[2]
        for span in through_a_pair.spans:
            if span.process.startswith(engine):
                assert leg.start_ms - 0.01 <= span.start_ms
                assert span.end_ms <= leg.end_ms + 0.01


def test_the_command_draws_it(demo: Deployment, through_a_pair: RequestTrace) -> None:
    drawn = run("trace", through_a_pair.id, "--url", demo.url)
    assert "\n  checksums" in drawn
    assert "\ndecode-0/rank-0\n" in drawn
    lines = run("trace", "--slowest", "3", "--format", "json", "--url", demo.url).splitlines()
    assert all(msgspec.json.decode(line, type=RequestTrace).spans for line in lines)


def test_its_line_is_in_the_log_and_debug_adds_decisions(
    demo: Deployment, through_a_pair: RequestTrace
) -> None:
    place = f"[{through_a_pair.id}] 200 /v1/completions route=prefill-0->decode-0 "
    assert place in (demo.log_dir / "router.log").read_text()
    mine = re.escape(through_a_pair.id)
    said = {"router": rf"\[{mine}\] route of", "prefill-0.rank-0": rf"lease of {mine}"}
    for log, words in (said | {"decode-0.rank-0": rf"pull of {mine}"}).items():
        line, path = re.compile(f"DEBUG .*{words}"), demo.log_dir / f"{log}.log"
        await_true(lambda line=line, path=path: line.search(path.read_text()), words)


SECRET = "Zebras whisper quietly about marmalade"
ASKED: list[tuple[str, dict[str, Any], int]] = [
    ("completions", {"prompt": SECRET, "return_token_ids": True, "logprobs": 2}, 200),
    ("completions", {"prompt": [SECRET, SECRET[::-1]], "stream": True}, 200),
    ("chat/completions", {"messages": [{"role": "user", "content": SECRET}]}, 200),
    ("completions", {"prompt": SECRET * 900}, 400),
    ("completions", {"prompt": SECRET, "temperature": SECRET}, 400),
    ("completions", {"prompt": {"text": SECRET}}, 400),
    ("completions", {"prompt": SECRET, "stop": [SECRET] * 99}, 400),
    ("chat/completions", {"messages": SECRET}, 400),
]


def test_nothing_tells_what_was_asked_and_answered(demo: Deployment) -> None:
    """Debug logs, the terminal, traces and the page's data contain no prompts and answers."""
    headers = {ROUTE_HEADER: WANTS_PAIR}
    api = Api(demo.url, headers=headers)
    outputs: list[str] = []
    ids: list[list[int]] = []
    for path, fields, expected in ASKED:
        body = {"max_tokens": 16, "temperature": 0, "ignore_eos": True} | fields
        if body.get("stream"):
            outputs += streamed_texts(post_text(demo.url, f"/v1/{path}", body, **headers))
            continue
        status, answer = api.post(f"/v1/{path}", body)
        assert status == expected, answer
        for choice in answer.get("choices", ()):
            outputs.append(choice["text"] if "text" in choice else choice["message"]["content"])
            ids += [choice[key] for key in ("prompt_token_ids", "token_ids") if key in choice]
    assert len(outputs) == 4
    assert ids
    last = "the-last-of-these"
    post(demo.url, {"prompt": SECRET, "max_tokens": 2}, last)
    places = ("router.log", "decode-0.log", "traces")
    await_true(lambda: all(last in told_by(demo)[place] for place in places), "all have logged it")
    told = told_by(demo)
    told["a leak"] = json.dumps([SECRET, ids[0]])
    assert {place for place, _ in places_of(told, [SECRET, SECRET[::-1], *outputs])} == {"a leak"}
    assert {place for place, _ in places_of_ids(told, ids)} == {"a leak"}


def streamed_texts(stream: str) -> list[str]:
    texts: dict[int, str] = {}
    for line in stream.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return list(texts.values())
