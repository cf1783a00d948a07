"""Engines of vLLM for tests: the CPU build that ``make test-vllm`` installs, and the demo model."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.e2e.client import Deployment, running_deployment
from tests.e2e.conftest import clean_environ

ENVIRONMENT = Path(__file__).parents[2] / ".venv-vllm"
ARGUMENTS = ("--engine", "vllm", "--max-model-len", "512", "--enforce-eager")
ENGINE_ARGS = {
    "enable-auto-tool-choice": True,
    "tool-call-parser": "hermes",
    "kv-events-config": {"enable_kv_cache_events": True},
}
START_TIMEOUT_S = 600.0
"""Two of them take 40 s on two quiet cores, and several times that beside other work."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith("tests/vllm/"):
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.processes)
            item.add_marker(pytest.mark.timeout(900))
    # Their launches end with them; those of other files may live on, and are too many beside them.
    first = ("test_verified.py", "test_far_hosts.py")
    items.sort(key=lambda item: item.path.name not in first)


@pytest.fixture(scope="session")
def vllm_command() -> str:
    command = Path(os.environ.get("PDLAUNCH_TEST_VLLM", ENVIRONMENT / "bin" / "vllm"))
    if not command.exists():
        pytest.skip(f"there is no vLLM at {command}: make test-vllm installs it")
    return str(command)


@contextlib.contextmanager
def running_engines(
    folder: Path,
    vllm_command: str,
    settings: Mapping[str, object],
    *flags: str,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Deployment]:
    """Run a deployment whose engines are vLLM's, of the demo model unless the settings name one."""
    config = folder / "launch.yaml"
    config.write_text(json.dumps(settings))
    with running_deployment(
        (str(config), *ARGUMENTS, "--engine-command", vllm_command, *flags),
        environ=clean_environ() | dict(environ or {}),
        timeout_s=START_TIMEOUT_S,
        log_dir=str(folder / "logs"),  # pytest keeps them, and vLLM says why it ends there alone
    ) as deployment:
        yield deployment


@pytest.fixture(scope="package")
def pair(vllm_command: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    settings = {"engine_args": ENGINE_ARGS}
    with running_engines(tmp_path_factory.mktemp("pair"), vllm_command, settings) as deployment:
        yield deployment
