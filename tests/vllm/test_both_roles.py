"""Engines of vLLM that do prefill and decode of a request themselves, behind the router."""

from __future__ import annotations

import pytest

from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import running_deployment
from tests.e2e.agreement import engines_of
from tests.e2e.conftest import clean_environ
from tests.vllm.conftest import ARGUMENTS, START_TIMEOUT_S

pytestmark = pytest.mark.vllm_long

PROMPTS = ("The capital of France is", "Water boils at", "List of prime numbers: 2, 3, 5,")


def test_two_engines_answer_as_each_of_them_alone(vllm_command: str) -> None:
    arguments = (*ARGUMENTS, "--dtype", "float32", "--both", "2", "--engine-command", vllm_command)
    with running_deployment(
        arguments, environ=clean_environ(), timeout_s=START_TIMEOUT_S
    ) as deployment:
        router = Api(deployment.url)
        assert [each["role"] for each in engines_of(router)] == ["both", "both"]
        for prompt in PROMPTS:
            body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1}
            answers = [router.post("/v1/completions", body) for _ in range(3)]
            assert [status for status, _ in answers] == [200] * 3
            texts = {answer["choices"][0]["text"] for _, answer in answers}
            assert len(texts) == 1
        page = router.get("/metrics")[1]
        assert "pdlaunch_router_fallbacks_total 0.0" in page
        for name in ("both-0", "both-1"):
            log = (deployment.log_dir / f"{name}.log").read_text(errors="replace")
            assert "NixlConnector" not in log
