"""What `make` says while it installs, and what each target installs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tools import install
from tools.install import steps

ROOT = Path(__file__).parents[2]


def make(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run make as a user without settings of pip or of an outer make; return exit code, output."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "MAKE", "MFLAGS"))
    }
    result = subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        env={**inherited, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    return result.returncode, result.stdout


def test_serving_installs_nothing_for_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    runtime = " ".join([*project["dependencies"], *extras["gguf"]])
    dev = " ".join(extras["dev"])
    for tool in ("triton", "pytest", "mypy", "ruff", "hypothesis"):
        assert tool in dev
        assert not re.search(rf"\b{tool}\b", runtime)
    assert not any("dev" in part for _, arguments in steps("runtime", "gguf") for part in arguments)


@pytest.mark.processes
def test_each_target_installs_what_it_needs(tmp_path: Path) -> None:
    fresh = f"VENV={tmp_path / 'venv'}"
    for target, tools in (("serve", False), ("install", False), ("test", True), ("lint", True)):
        code, plan = make("--dry-run", fresh, target)
        assert code == 0, plan
        assert "install.py runtime 'gguf'" in plan
        assert ("install.py dev" in plan) is tools, target


@pytest.mark.processes
@pytest.mark.parametrize("version", ["3.10.13", None])
def test_another_python_is_refused_before_anything_is_installed(
    version: str | None, tmp_path: Path
) -> None:
    python = tmp_path / "python3"
    if version is not None:
        told = (
            f"import sys; sys.version = {version!r}; sys.version_info = (3, 10); exec(sys.argv[1])"
        )
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{told}" "$2"\n')
        python.chmod(0o755)
    code, said = make("serve", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert code == 2
    assert f"needs Python 3.11 or newer; {python} is {version or 'missing'}\n" in said
    assert "fix: make serve PYTHON=python3.11\n" in said
    assert not (tmp_path / "venv").exists()


@pytest.mark.processes
def test_no_package_index_is_told_as_such(tmp_path: Path) -> None:
    code, said = make(
        "serve",
        f"PYTHON={sys.executable}",
        f"VENV={tmp_path / 'venv'}",
        environment={
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": "http://127.0.0.1:9/",
            "PIP_RETRIES": "1",
        },
    )
    assert code == 2
    assert "[1/3] installing PyTorch\n" in said
    assert "the package index does not answer; trying again" in said
    assert "error: no package index answers: pip cannot reach http://127.0.0.1:9/torch/" in said
    assert "fix: Check the network." in said
    assert "No matching distribution" not in said
    assert not list((tmp_path / "venv").glob(".installed*"))


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Titles of the steps that ran; the environment is an empty folder."""
    calls: list[str] = []

    def run_pip(title: str, arguments: list[str]) -> bool:
        calls.append(title)
        install.LOG.write_text("")
        return True

    monkeypatch.setattr(install, "run_pip", run_pip)
    monkeypatch.setattr(install, "LOG", tmp_path / "venv" / "install.log")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    (tmp_path / "venv").mkdir()
    return calls


def test_an_environment_that_was_moved_is_told(
    pip_calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install.main(["runtime", "gguf"])
    (tmp_path / "venv").rename(tmp_path / "moved")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "moved"))
    monkeypatch.setattr(install, "LOG", tmp_path / "moved" / "install.log")
    assert install.main(["runtime", "gguf"]) == 1
    said = capsys.readouterr().err
    assert f"was made in {tmp_path / 'venv'}, and does not work elsewhere" in said
    assert "fix: make clean" in said
    assert len(pip_calls) == 3
