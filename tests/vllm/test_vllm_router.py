"""vllm-router in front of a prefill and a decode engine of vLLM that pdlaunch serves."""

from pathlib import Path

import pytest

from pdlaunch.launch.client.deployment import held_port
from tests.e2e.agreement import engines_of
from tests.e2e.api import complete, greedy_body
from tests.e2e.client import admin_api
from tests.e2e.lone_router import needs_vllm_router, running_vllm_router
from tests.e2e.test_doors import answered
from tests.vllm.conftest import running_engines
from tests.vllm.test_pair import NUM_TOKENS, bytes_read, prompt_of

pytestmark = pytest.mark.vllm_long

OTHER_ROUTER = "of-another-router"


@needs_vllm_router
def test_vllm_router_answers_with_the_same_tokens(vllm_command: str, tmp_path: Path) -> None:
    """The engines have ports and a key, as another router needs them."""
    environ = {"PDLAUNCH_ENGINE_API_KEY": OTHER_ROUTER}
    with held_port() as of_prefill, held_port() as of_decode:
        ports = {"prefill": {"port": of_prefill}, "decode": {"port": of_decode}}
        settings = {"dtype": "float32"} | ports
        with running_engines(tmp_path, vllm_command, settings, environ=environ) as launch:
            urls = {each["role"]: each["url"] for each in engines_of(admin_api(launch.url))}
            with running_vllm_router(
                prefill=[urls["prefill"]],
                decode=urls["decode"],
                api_key=OTHER_ROUTER,
                log_file=tmp_path / "log",
            ) as theirs:
                for seed, stream in enumerate((False, True), start=120):
                    body = greedy_body(prompt_of(seed), NUM_TOKENS) | {"model": "smollm2"}
                    num_bytes = bytes_read(launch.url)
                    told = answered(theirs, "completions", body | {"stream": stream})
                    assert bytes_read(launch.url) > num_bytes
                    assert told[0] == complete(launch.url, prompt_of(seed), NUM_TOKENS)
