"""The files of the model change under a running launch: no answer does."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

import pytest

from pdlaunch.launch.client.deployment import Deployment, running_deployment
from tests.e2e.api import complete, streamed
from tests.e2e.conftest import default_environ
from tests.e2e.faults import TINY
from tests.e2e.test_dead_prefill import state_of
from tests.e2e.tiny_models import greedy, make_tiny_model
from tests.e2e.waiting import await_true

PROMPT = list(range(40, 100))
NUM_TOKENS = 300


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """The model that is launched, and one of the same shapes with other weights and tokenizer."""
    launched, other = (make_tiny_model("llama", tmp_path / str(n), seed=n) for n in (1, 2))
    settings = other / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("m.content", "m.role"))
    return launched, other


def test_weights_that_are_overwritten_change_no_token(models: tuple[Path, Path]) -> None:
    launched, other = models
    (expected,) = greedy(launched, [PROMPT], NUM_TOKENS)
    arguments = ("--model", str(launched), "--both", "2", *TINY)
    with running_deployment(arguments, environ=default_environ()) as deployment:
        with streamed(deployment.url, PROMPT, NUM_TOKENS) as tokens:
            found = list(islice(tokens, 5))
            # Into the very file that the ranks have read.
            shutil.copyfile(other / "model.safetensors", launched / "model.safetensors")
            assert found + list(tokens) == expected
        restart_fails(deployment, "both-1/rank-0", "model.safetensors (SHA-256 ")
        for salt in "abc":
            assert complete(deployment.url, PROMPT, NUM_TOKENS, cache_salt=salt) == expected


def test_another_chat_template_comes_into_no_engine(models: tuple[Path, Path]) -> None:
    launched, other = models
    arguments = ("--model", str(launched), "--both", "2", *TINY)
    with running_deployment(arguments, environ=default_environ()) as deployment:
        (other / "tokenizer_config.json").replace(launched / "tokenizer_config.json")
        restart_fails(deployment, "both-1", "tokenizer_config.json (SHA-256 ")


def restart_fails(deployment: Deployment, name: str, changed: str) -> None:
    """Kill a process; its successor is not let in, and people are told which file differs."""
    deployment.processes()[name].kill()
    await_true(
        lambda: f"the model has changed since this launch began: {changed}" in deployment.output(),
        "the next one is refused",
    )
    assert state_of(deployment, "both-1") != "ready"
    assert state_of(deployment, "both-0") == "ready"
