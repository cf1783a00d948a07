"""A router in front of engines of vLLM, which verify nothing, know fields of their own, and name
their first token if they use pdlaunch's connector.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from aiohttp import web

from pdlaunch.http.headers import ROUTE_HEADER
from pdlaunch.router.continuation import LOST_REASONS
from tests.router.conftest import Answer, Stand, proof
from tests.router.fake_engine import Seen, until
from tests.router.fake_vllm_engine import (
    CACHED_AT_PREFILL,
    SCRIPT,
    FakeVllmEngine,
    text_of,
    vllm_pairs,
)

PROMPT = "a prompt of more than twenty tokens|"
NUM_BYTES = len(SCRIPT.encode())
RECOMPUTES = 'pdlaunch_router_silent_recomputes_total{decode="decode-0",prefill="prefill-0"}'


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": PROMPT, "max_tokens": 100} | fields


def chat(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Say something that is long enough"}]
    return {"model": "tiny", "messages": messages, "max_tokens": 100} | fields


async def start_pair(
    stand: Stand, *, names_first_token: bool = False, **options: Any
) -> tuple[FakeVllmEngine, FakeVllmEngine]:
    prefill, decode = engines = vllm_pairs()
    prefill.names_first_token = names_first_token
    stand.pairs = [proof("prefill-0", "decode-0")]
    await stand.start(engines, **options)
    return prefill, decode


def asked(engine: FakeVllmEngine) -> list[dict[str, Any]]:
    """Return the bodies of generations, without what the router asks besides."""
    return [seen.body for seen in engine.seen if not seen.body.get("use_beam_search")]


async def test_kv_goes_over_proven_pairs_alone(stand: Stand) -> None:
    engines = vllm_pairs(2)
    prefills, decodes = engines[:2], engines[2:]
    stand.pairs = [proof("prefill-0", "decode-1")]
    await stand.start(engines)
    for stream in (True, False) * 2:
        answer = await stand.post(completion(stream=stream))
        assert answer.texts() == {0: SCRIPT}
        assert answer.headers[ROUTE_HEADER].startswith("prefill-0->decode-1; kind=pair;")
    assert [len(engine.seen) for engine in engines] == [4, 0, 0, 4]
    assert all(body["kv_transfer_params"]["do_remote_prefill"] for body in asked(decodes[1]))

    # What was proven of its predecessor says nothing of a prefill engine.
    prefills[0].incarnation = 2
    stand.publish()
    assert (await stand.post(completion())).texts() == {0: SCRIPT}
    assert len(prefills[0].seen) == 4
    assert stand.metric("pdlaunch_router_fallbacks_total") == 1


@pytest.mark.parametrize("value", ["x", ["x"], {"do_remote_prefill": True}])
async def test_clients_cannot_hide_transfer_params_in_xargs(stand: Stand, value: Any) -> None:
    """vLLM would hand them to its connector, and a text there ends its engine core."""
    prefill, decode = await start_pair(stand)
    hidden = {"kv_transfer_params": value, "other": 1}
    answer = await stand.post(completion(max_tokens=1, vllm_xargs=hidden))
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "vllm_xargs.kv_transfer_params"
    assert not asked(prefill)
    assert not asked(decode)
    answer = await stand.post(completion(max_tokens=1, vllm_xargs={"other": 1}))
    assert answer.status == 200
    (body,) = asked(prefill) + asked(decode)
    assert body["vllm_xargs"] == {"other": 1}


@pytest.mark.parametrize("names_first_token", [False, True])
async def test_decode_that_dies_is_no_reason_to_read_a_lease_twice(
    stand: Stand, names_first_token: bool
) -> None:
    """It may have read the blocks already, and prefill given them to others."""
    prefill, _, first, second = vllm_pairs(2)
    prefill.names_first_token = names_first_token
    stand.pairs = [proof("prefill-0", f"decode-{index}") for index in range(2)]
    first.die_after = 0
    await stand.start([prefill, first, second])
    answers = [await stand.post(completion(stream=True)) for _ in range(2)]
    assert [answer.texts() for answer in answers] == [{0: SCRIPT}] * 2
    assert first.seen
    bodies = asked(first) + asked(second)
    if names_first_token:
        assert all(text_of(body["prompt"]).endswith("|G") for body in bodies)
    handed = [body.get("kv_transfer_params") for body in bodies]
    leases = [params["remote_request_id"] for params in handed if params]
    assert len(leases) == len(set(leases)) == len(prefill.seen) == 2


@pytest.mark.parametrize("stream", [True, False])
async def test_a_silent_recompute_is_found_and_the_pair_proven_anew(
    stand: Stand, stream: bool
) -> None:
    _, decode = await start_pair(stand)
    assert (await stand.post(completion(stream=stream))).texts() == {0: SCRIPT}
    assert not stand.doubted
    decode.pulls = False
    assert (await stand.post(completion(stream=stream))).texts() == {0: SCRIPT}
    (doubted,) = stand.doubted
    assert (doubted.local, doubted.peer, doubted.peer_incarnation) == ("decode-0", "prefill-0", 1)
    assert stand.metric(RECOMPUTES) == 1
    status = await stand.get("/pdlaunch/status")
    assert status["pairs"] == []
    (event,) = (each for each in status["events"] if each["kind"] == "pair")
    assert (event["name"], event["is_bad"]) == ("prefill-0 -> decode-0", True)
    assert "although it was handed their KV blocks" in event["text"]

    assert (await stand.post(completion(stream=stream))).texts() == {0: SCRIPT}
    assert "kv_transfer_params" not in asked(decode)[-1]
    decode.pulls = True
    stand.publish()  # the canary has come through
    await stand.post(completion(stream=stream))
    assert "kv_transfer_params" in asked(decode)[-1]
    assert stand.metric(RECOMPUTES) == 1


async def test_a_lease_that_ends_in_the_queue_of_decode_is_no_doubt_of_the_pair(
    stand: Stand,
) -> None:
    prefill, decode = engines = vllm_pairs()
    lease_s = 1.0
    prefill.capabilities = msgspec.structs.replace(prefill.capabilities, lease_s=lease_s)
    stand.pairs = [proof("prefill-0", "decode-0")]
    decode.pulls, answer_at_once = False, decode._answer

    async def answer(request: web.Request, seen: Seen) -> web.StreamResponse:
        await asyncio.sleep(lease_s + 0.1)
        return await answer_at_once(request, seen)

    decode._answer = answer  # type: ignore[method-assign]
    await stand.start(engines)
    assert (await stand.post(completion(stream=True))).texts() == {0: SCRIPT}
    assert stand.doubted == []
    assert stand.metric(RECOMPUTES) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_prompt_that_is_to_be_echoed_stands_before_its_answer(
    stand: Stand, stream: bool
) -> None:
    """vLLM leaves it out where it is asked for the ids of tokens."""
    await start_pair(stand)
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
    answer = await stand.post(completion(echo=True, stream=stream, **options))
    assert answer.texts() == {0: PROMPT + SCRIPT}
    told = answer.events()[-1] if stream else answer.json()
    assert told["usage"]["completion_tokens"] == NUM_BYTES
    # Clients that ask for ids get what vLLM gives them.
    answer = await stand.post(completion(echo=True, stream=stream, return_token_ids=True))
    assert answer.texts() == {0: SCRIPT}


FIELDS: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "tool_choice": "required",
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    "structured_outputs": {"regex": "a+"},
    "include_reasoning": True,
    "a_field_of_tomorrow": {"deep": [1, None]},
}
MESSAGE = {
    "role": "assistant",
    "content": None,
    "reasoning": "because",
    "reasoning_content": "because",
    "tool_calls": [
        {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    ],
    "refusal": None,
}


async def test_fields_and_whole_answers_pass_unchanged(stand: Stand) -> None:
    prefill, decode = await start_pair(stand)
    decode.message = MESSAGE
    images = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    messages = [{"role": "user", "content": "Look|"}]
    body = chat(**FIELDS, messages=messages, mm_processor_kwargs={"images": images})
    answer = await stand.post(body)
    for engine in (prefill, decode):
        (body,) = asked(engine)
        assert {name: body[name] for name in FIELDS} == FIELDS
        assert body["mm_processor_kwargs"] == {"images": images}
        assert "seed" not in body
    said = answer.json()
    assert said["choices"][0]["message"] == MESSAGE
    assert said["system_fingerprint"] == "fake"
    assert "kv_transfer_params" not in said
    # What prefill had cached, and not what decode has pulled.
    assert said["usage"]["prompt_tokens_details"] == {"cached_tokens": CACHED_AT_PREFILL}


async def test_streamed_tool_calls_and_reasoning_pass_unchanged(stand: Stand) -> None:
    _, decode = await start_pair(stand)
    decode.message = {name: value for name, value in MESSAGE.items() if value is not None}
    answer = await stand.post(chat(**FIELDS, max_tokens=2, stream=True))
    deltas = [choice["delta"] for event in answer.events() for choice in event["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    expected = {name: value for name, value in decode.message.items() if name != "role"}
    assert deltas[1:] == [expected] * 2


async def test_adapters_are_models_that_engines_name(stand: Stand) -> None:
    _, decode = await start_pair(stand)
    models = (await stand.get("/v1/models"))["data"]
    assert [model["id"] for model in models] == ["tiny", "tiny-lora"]
    assert (await stand.get("/v1/models/tiny-lora"))["id"] == "tiny-lora"
    answer = await stand.post(completion(model="tiny-lora"))
    assert answer.json()["model"] == "tiny-lora"
    assert asked(decode)[0]["model"] == "tiny-lora"
    assert (await stand.post(completion(model="nobody"))).status == 404


@pytest.mark.parametrize("fields", [{"n": 2}, {"prompt_logprobs": 1}, {"use_beam_search": True}])
async def test_what_cannot_share_a_lease_is_served_by_one_engine(
    stand: Stand, fields: dict[str, Any]
) -> None:
    prefill, decode = await start_pair(stand)
    answer = await stand.post(completion(**fields))
    assert answer.texts()[0] == SCRIPT
    assert len(answer.json()["choices"]) == fields.get("n", 1)
    assert not prefill.seen
    (body,) = asked(decode) or [decode.seen[0].body]
    assert fields.items() <= body.items()


async def test_embeddings_are_refused(stand: Stand) -> None:
    await start_pair(stand)
    answer = await stand.post(completion(prompt=None, prompt_embeds=["tensor"]))
    assert (answer.status, answer.json()["error"]["param"]) == (400, "prompt_embeds")
    assert (await stand.post(completion(prompt_embeds=[]))).status == 200


CUTS = [1, 3, 4, 9, 10, 11, 12, 17, 24, 26, 28, 30]
"""Tokens after which decode dies: within ü and the smiley, and between characters."""


@pytest.mark.parametrize("names_first_token", [False, True], ids=["decode's", "prefill's"])
@pytest.mark.parametrize("make", [completion, chat])
async def test_a_stream_goes_on_from_its_tokens(
    stand: Stand, make: Callable[..., dict[str, Any]], names_first_token: bool
) -> None:
    """The first token is decode's or prefill's."""
    prefill, decode = await start_pair(stand, names_first_token=names_first_token)
    body = make(stream=True, stream_options={"include_usage": True})
    unbroken = await stand.post(body)
    (end,) = unbroken.finish_reasons()[0]
    num_tokens = unbroken.events()[-1]["usage"]["completion_tokens"]
    for cut in [cut for cut in CUTS if cut < num_tokens]:
        # The connection breaks once the router has read what was sent before.
        told = stand.metric("pdlaunch_router_generation_tokens_total")
        stand.die_after(decode, cut, num_told=int(told) + cut + names_first_token)
        broken = await stand.post(body)
        assert broken.texts() == unbroken.texts(), cut
        assert broken.finish_reasons() == {0: [end]}, cut
        usage = broken.events()[-1]["usage"]
        assert usage["prompt_tokens"] == unbroken.events()[-1]["usage"]["prompt_tokens"]
        assert usage["completion_tokens"] == num_tokens
        assert text_of(asked(prefill)[-1]["prompt"]).count("|") == 1
        decode.incarnation += 1
        stand.publish()
    assert stand.metric("pdlaunch_router_migrations_total") > 5
    assert stand.metric("pdlaunch_router_lost_streams_total") == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_stream_begins_with_the_token_of_prefill(stand: Stand, path: str) -> None:
    prefill, decode = await start_pair(stand, names_first_token=True)
    decode.hold_after = 0
    body = (chat if "chat" in path else completion)(stream=True, max_tokens=4)
    body["stream_options"] = {"include_usage": True}
    async with stand.session.post(path, json=body) as response:
        raw = b""
        while b'"G"' not in raw:
            raw += await response.content.readany()
        await decode.holding.wait()
        decode.go.set()
        raw += await response.content.read()
    answer = Answer(response.status, response.headers, raw)
    assert (answer.texts(), answer.finish_reasons()) == ({0: "Grü"}, {0: ["length"]})
    usage = answer.events()[-1]["usage"]
    assert usage["completion_tokens"] == 4
    assert usage["prompt_tokens_details"]["cached_tokens"] == CACHED_AT_PREFILL
    (continued,) = asked(decode)
    assert text_of(continued["prompt"]).endswith("|G")
    assert usage["prompt_tokens"] == len(continued["prompt"]) - 1
    assert continued["max_tokens"] == 3
    assert continued["kv_transfer_params"]["do_remote_prefill"]
    assert not prefill.leases
    assert stand.metric("pdlaunch_router_migrations_total") == 0


@pytest.mark.parametrize(
    ("script", "fields"),
    [
        ("über", {}),
        (SCRIPT, {"stream": False}),
        (SCRIPT, {"seed": 1}),
        (SCRIPT, {"stop": "STOP"}),
        (SCRIPT, {"tools": FIELDS["tools"]}),
    ],
    ids=["half a character", "a whole answer", "seed", "stop", "tools"],
)
async def test_decode_draws_the_first_token_where_it_could_not_continue(
    stand: Stand, script: str, fields: dict[str, Any]
) -> None:
    prefill, decode = await start_pair(stand, names_first_token=True)
    prefill.script = decode.script = script
    answer = await stand.post(chat(**{"stream": True} | fields))
    assert answer.texts() == {0: script}
    (body,) = asked(decode)
    assert "messages" in body
    assert body["kv_transfer_params"]["do_remote_prefill"]


async def test_the_limit_of_the_whole_answer_holds_across_the_seam(stand: Stand) -> None:
    prefill, decode = await start_pair(stand)
    stand.die_after(decode, 6, num_told=6)
    body = completion(max_tokens=20, min_tokens=7, stream=True, temperature=0)
    answer = await stand.post(body)
    assert answer.texts() == {0: text_of(list(SCRIPT.encode()[:20]))}
    assert answer.finish_reasons() == {0: ["length"]}
    continued = asked(prefill)[-1]
    assert (continued["max_tokens"], continued["min_tokens"]) == (14, 1)
    assert continued["temperature"] == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"seed": 7}, "seed"),
        ({"tools": FIELDS["tools"]}, "fields"),
        ({"stop": "STOP"}, "fields"),
        ({"logprobs": True}, "fields"),
        ({"response_format": {"type": "json_object"}}, "structured output"),
        ({"structured_outputs": {"regex": "a+"}}, "structured output"),
        ({"frequency_penalty": 0.5}, "fields"),
        ({"a_field_of_tomorrow": 1}, "fields"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {}}, {}]}
                ]
            },
            "images",
        ),
    ],
)
async def test_a_stream_that_cannot_go_on_ends_with_a_named_error(
    stand: Stand, fields: dict[str, Any], reason: str
) -> None:
    prefill, decode = await start_pair(stand)
    stand.die_after(decode, 5, num_told=5)
    answer = await stand.post(chat(**fields, stream=True))
    error = answer.events()[-1]["error"]
    assert error["code"] == "stream_lost"
    assert f"({reason})" in error["message"]
    assert reason in LOST_REASONS
    assert stand.metric(f'pdlaunch_router_lost_streams_total{{reason="{reason}"}}') == 1
    assert len(prefill.seen) == 1


async def test_a_lease_that_nobody_pulls_is_given_back_through_decode(stand: Stand) -> None:
    prefill, decode = await start_pair(stand)
    decode.max_model_len = 50
    decode.incarnation = 2
    stand.publish()
    await stand.state.settled()
    answer = await stand.post(completion(max_tokens=40))
    assert answer.status == 400
    assert len(prefill.seen) == 1
    await until(lambda: not prefill.leases)
    assert stand.metric("pdlaunch_router_releases_total") == 1


async def test_a_chunk_that_says_nothing_keeps_back_none_before_it(stand: Stand) -> None:
    """The engine holds within a character; what came with its first half is told."""
    _, decode = await start_pair(stand)
    decode.hold_after = 3
    request = stand.session.post("/v1/completions", json=completion(stream=True))
    async with request as told:
        read = b""
        while read.count(b"data: ") < 2:
            read += await told.content.readany()
        assert (b'"text":"G"' in read, b'"text":"r"' in read) == (True, True)
        decode.go.set()
        read += await told.content.read()
    assert read.endswith(b"data: [DONE]\n\n")
