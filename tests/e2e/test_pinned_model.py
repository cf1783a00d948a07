"""The files of the model change during a launch. Its answers stay the same."""

import shutil
from itertools import islice
from pathlib import Path

from tests.e2e.api import complete, states, streamed
from tests.e2e.client import Api, Deployment
from tests.e2e.conftest import default_environ, launched
from tests.e2e.tiny_models import greedy, make_tiny_model
from tests.e2e.waiting import await_true

PROMPT = list(range(40, 100))
NUM_TOKENS = 300
TOKENIZED_BY_ENGINES = "prompts are tokenized by engines"
CHANGED = "the model has changed since this launch began: {} (SHA-256 "


def test_files_that_are_overwritten_change_no_token(tmp_path: Path) -> None:
    model, other = (make_tiny_model("llama", tmp_path / str(n), seed=n) for n in (1, 2))
    (expected,) = greedy(model, [PROMPT], NUM_TOKENS)
    with launched(model, "--both", "2", environ=default_environ()) as deployment:
        with streamed(deployment.url, PROMPT, NUM_TOKENS) as tokens:
            found = list(islice(tokens, 5))
            # Overwrite the file that the ranks have read.
            shutil.copyfile(other / "model.safetensors", model / "model.safetensors")
            assert found + list(tokens) == expected
        restart_fails(deployment, "both-1/rank-0", "model.safetensors")
        for salt in "abc":
            assert complete(deployment.url, PROMPT, 16, cache_salt=salt) == expected[:16]
        change_template(model)
        restart_fails(deployment, "both-1", "tokenizer_config.json")


def test_a_router_that_comes_back_takes_no_other_tokenizer(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path)
    with launched(model, "--both", "2", environ=default_environ()) as deployment:
        expected = prompt_of_chat(deployment)
        change_template(model)
        deployment.processes()["router"].kill()
        log = deployment.log_dir / "router.log"
        await_true(lambda: TOKENIZED_BY_ENGINES in log.read_text(), "the next one has read it")
        assert prompt_of_chat(deployment) == expected


def change_template(model: Path) -> None:
    settings = model / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("m.content", "m.role"))


def prompt_of_chat(deployment: Deployment) -> list[int]:
    """Return the token ids of a prompt that is long enough for the router to tokenize it."""
    chat = {
        "messages": [{"role": "user" * 16, "content": "text" * 100}],
        "max_tokens": 1,
        "return_token_ids": True,
    }
    status, answer = Api(deployment.url).post("/v1/chat/completions", chat)
    assert status == 200, answer
    return answer["prompt_token_ids"]


def restart_fails(deployment: Deployment, name: str, changed: str) -> None:
    """Kill a process. Its successor is refused, and the terminal names the file that differs."""
    deployment.processes()[name].kill()
    await_true(lambda: CHANGED.format(changed) in deployment.output(), "the next one is refused")
    health = Api(deployment.url)
    await_true(
        lambda: health.get_object("/health")[1].get("model_changed") == ["both-1"],
        "/health names the engine",
    )
    found = states(deployment.url)
    assert (found["both-0"], found.get("both-1") == "ready") == ("ready", False)
