"""A model of a few bytes, a configuration file, and check-config on a healthy machine."""

import os
from pathlib import Path

import pytest

from pdlaunch.checks import probed
from pdlaunch.cli import preflight
from pdlaunch.protocol.process import run_dirs
from tests.checks.contexts import CPU
from tests.cli.deployment_server import running_server
from tests.command_line import invoke
from tests.config.model_files.files import tiny_model


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("PDLAUNCH_", "PYTORCH_", "UCX_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def model(tmp_path):
    return Path(tiny_model(tmp_path / "model"))


@pytest.fixture
def check(model, monkeypatch):
    monkeypatch.setenv("PDLAUNCH_MODEL", str(model))
    monkeypatch.setattr(preflight, "probe_machine", lambda: CPU)
    monkeypatch.setattr(probed, "probe_port", lambda host, port: "")

    def run(*arguments, columns="80", **environ):
        arguments = ["check-config", *map(str, arguments)]
        result = invoke(arguments, env={"COLUMNS": columns, "NO_COLOR": "1", **environ})
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            result.exception
        )
        return result

    return run


@pytest.fixture
def router(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dirs, "base_dir", lambda: tmp_path)
    with running_server() as server:
        yield server


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "deploy.yaml"
        path.write_text(text)
        return path

    return write
