"""``pdlaunch router`` in front of real engines of vLLM, which it knows by their URLs alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdlaunch.launch.client.admin import admin_api
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment
from tests.e2e.api import complete, streamed
from tests.e2e.conftest import clean_environ
from tests.e2e.lone_router import running_router
from tests.e2e.test_doors import ask, bearer
from tests.e2e.waiting import await_true
from tests.vllm.test_pair import NUM_TOKENS, bytes_read, prompt_of, states

ADMIN = "of-the-operator"


def command(method: str, url: str, body: object = None) -> tuple[int, dict[str, Any]]:
    status, text = ask(method, url, body, Authorization=bearer(ADMIN))
    return status, json.loads(text)


@pytest.fixture(scope="module")
def urls(pair: Deployment) -> dict[str, str]:
    _, status = Api(pair.url).get_object("/pdlaunch/status")
    return {engine["name"]: engine["url"] for engine in status["engines"]}


@pytest.fixture(scope="module")
def router(urls: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = Path(urls["decode-0"].removeprefix("unix:")).parent
    with running_router(
        (
            *("--engine", "vllm", "--engine-urls", f"unix:{folder}"),
            *("--prefill", urls["prefill-0"], "--decode", urls["decode-0"]),
        ),
        clean_environ() | {"PDLAUNCH_ADMIN_API_KEY": ADMIN},
        tmp_path_factory.mktemp("router") / "log",
    ) as url:
        yield url


def test_a_canary_has_come_through_and_tokens_are_those_of_one_engine(
    pair: Deployment, router: str
) -> None:
    assert Api(router).metrics()["pdlaunch_router_canaries_total"] >= 1
    alone = admin_api(pair.url).engine("prefill-0")
    for seed in range(40, 43):
        prompt = prompt_of(seed)
        before = bytes_read(router)
        tokens = complete(router, prompt, NUM_TOKENS)
        assert bytes_read(router) > before
        assert tokens == complete(alone, prompt, NUM_TOKENS, model="smollm2")


def test_an_engine_is_drained_removed_and_added_while_a_request_runs(
    pair: Deployment, urls: dict[str, str], router: str
) -> None:
    prompt = prompt_of(50)
    expected = complete(router, prompt, 100)
    answers: list[object] = []

    def remove() -> None:
        url = f"{router}/pdlaunch/engines/decode-0?drain_timeout_s=240"
        answers.append(command("DELETE", url))

    with streamed(router, prompt, 100) as tokens:
        first = next(tokens)
        removal = threading.Thread(target=remove)
        removal.start()
        await_true(lambda: states(router)["decode-0"] == "draining", "it is drained")
        assert [first, *tokens] == expected
    removal.join(300)
    assert answers == [(200, {"engine": "decode-0", "drained": True})]
    assert set(states(router)) == {"prefill-0"}
    assert complete(router, prompt, NUM_TOKENS) == expected[:NUM_TOKENS]

    new = {"name": "decode-again", "role": "decode", "url": urls["decode-0"]}
    assert command("POST", f"{router}/pdlaunch/engines", new)[0] == 200
    await_true(lambda: states(router).get("decode-again") == "ready", "it is proven")
    before = bytes_read(router)
    assert complete(router, prompt_of(51), NUM_TOKENS)
    assert bytes_read(router) > before
    # Its launch has seen nothing of all this.
    assert states(pair.url) == {"prefill-0": "ready", "decode-0": "ready"}
