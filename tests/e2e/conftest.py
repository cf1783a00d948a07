import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.client import Deployment, running_deployment
from tests.e2e.tiny_models import make_tiny_model

DEMO_ARGUMENTS = ("--dtype", "float32", "--kv-cache-memory", "256MiB")


def default_environ() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PDLAUNCH_") or name == "PDLAUNCH_CACHE"
    }


def clean_environ() -> dict[str, str]:
    """The environment of a launch whose prompts go through pairs, for tests of transfers. By
    default, decode computes short prompts, and prompts that would wait at prefill.
    """
    return default_environ() | {"PDLAUNCH_ROUTING": "pairs"}


@contextmanager
def launched(
    model: Path, *arguments: str, environ: Mapping[str, str] | None = None
) -> Iterator[Deployment]:
    """A launch of a tiny model in float32, by default with one prefill and one decode engine.
    ``environ``: by default that of ``clean_environ``.
    """
    command = ("--model", str(model), "--dtype", "float32", "--kv-cache-memory", "16MiB")
    with running_deployment(
        (*command, *arguments), environ=clean_environ() if environ is None else environ
    ) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a context of 2,048 tokens. No test writes to its files."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("models"), max_model_len=2048)


@pytest.fixture(scope="package")
def demo() -> Iterator[Deployment]:
    """One prefill and one decode engine with the demo model in float32 and debug logs. They run
    until the tests of this folder have ended.
    """
    arguments = (*DEMO_ARGUMENTS, "--log-level", "debug")
    with running_deployment(arguments, environ=clean_environ()) as deployment:
        yield deployment
