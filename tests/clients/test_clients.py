"""Client libraries, as their users call them, against one prefill and one decode engine."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdlaunch.engine.models.convert import ensure_converted
from pdlaunch.launch.client.deployment import Deployment, running_deployment
from tests.e2e.api import total_now
from tests.e2e.conftest import DEMO_ARGUMENTS, clean_environ

FOLDER = Path(__file__).parent
PYTHON = FOLDER.parents[1] / ".venv-clients" / "bin" / "python"

pytestmark = [
    pytest.mark.clients,
    pytest.mark.processes,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not PYTHON.exists(), reason="there are no clients: make test-clients installs them"
    ),
]


@pytest.fixture(scope="module")
def demo() -> Iterator[Deployment]:
    # An answer without a limit may fill the context, for which the KV cache needs room.
    arguments = (*DEMO_ARGUMENTS, "--max-model-len", "2048")
    with running_deployment(arguments, environ=clean_environ()) as deployment:
        yield deployment


@pytest.mark.parametrize(
    "name",
    [
        *("openai", "openai_responses", "instructor", "pydantic_ai", "langchain", "llama_index"),
        *("litellm", "lm_eval"),
    ],
)
def test_a_client_is_answered(demo: Deployment, name: str) -> None:
    model_dir = ensure_converted("smollm2", lambda stage, share: None)
    done = subprocess.run(
        [PYTHON, FOLDER / "programs.py", name, f"{demo.url}/v1", model_dir],
        env=os.environ | {"OPENAI_API_KEY": "unused", "LITELLM_LOCAL_MODEL_COST_MAP": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_structured_answers_went_through_the_pair(demo: Deployment) -> None:
    assert total_now(demo.url, "kv_transfers") > 10
