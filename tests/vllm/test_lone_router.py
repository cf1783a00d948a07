"""``pdlaunch router`` in front of real engines of vLLM, which it knows by their URLs alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.api import complete, streamed
from tests.e2e.client import Api, Deployment, admin_api
from tests.e2e.conftest import clean_environ
from tests.e2e.lone_router import running_router
from tests.e2e.waiting import await_true
from tests.vllm.test_pair import NUM_TOKENS, assert_pulled, prompt_of, states


@pytest.fixture(scope="module")
def urls(pair: Deployment) -> dict[str, str]:
    _, status = Api(pair.url).get_object("/pdlaunch/status")
    return {engine["name"]: engine["url"] for engine in status["engines"]}


@pytest.fixture(scope="module")
def engines_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines") / "engines.yaml"


def listing(**decodes: str) -> str:
    engines = [f"{{name: {name}, role: decode, url: '{url}'}}" for name, url in decodes.items()]
    return f"engines: [{', '.join(engines)}]\n"


@pytest.fixture(scope="module")
def router(
    urls: dict[str, str], engines_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    engines_file.write_text(listing(first=urls["decode-0"]))
    with running_router(
        (
            *("--engine", "vllm", "--prefill", urls["prefill-0"]),
            *("--engines-file", str(engines_file)),
            *("--drain-timeout", "240"),
        ),
        clean_environ(),
        tmp_path_factory.mktemp("router") / "log",
    ) as url:
        await_true(lambda: states(url).get("first") == "ready", "its pair is proven")
        yield url


@pytest.mark.vllm_long
def test_an_engine_is_drained_removed_and_added_while_a_request_runs(
    pair: Deployment, urls: dict[str, str], router: str, engines_file: Path
) -> None:
    prompt = prompt_of(50)
    alone = admin_api(pair.url).engine("prefill-0")
    expected = complete(alone, prompt, 100, model="smollm2")
    assert Api(router).metrics()["pdlaunch_router_canaries_total"] >= 1
    with streamed(router, prompt, 100) as tokens:
        first = next(tokens)
        engines_file.write_text(listing())
        await_true(lambda: states(router)["first"] == "draining", "it is drained")
        assert [first, *tokens] == expected
    await_true(lambda: set(states(router)) == {"prefill-0"}, "it is removed")
    assert complete(router, prompt, NUM_TOKENS) == expected[:NUM_TOKENS]

    engines_file.write_text(listing(again=urls["decode-0"]))
    await_true(lambda: states(router).get("again") == "ready", "it is proven")
    assert_pulled(router, alone, 51)
    # Its launch has seen nothing of all this.
    assert states(pair.url) == {"prefill-0": "ready", "decode-0": "ready"}
