"""Every example is a configuration without errors, and the workflow calls commands that exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pdlaunch.cli.app import COMMANDS

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["demo.yaml", "two_by_two.yaml", "tensor_parallel.yaml"])
def test_examples_are_clean(name: str) -> None:
    command = [sys.executable, "-m", "pdlaunch", "check-config", str(EXAMPLES / name), "--assume-platform", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_workflow_calls_commands_that_exist() -> None:
    workflow = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())
    lines = [line for step in workflow["jobs"]["smoke"]["steps"] for line in step.get("run", "").splitlines()]
    called = [line.split()[1] for line in lines if line.startswith("pdlaunch ")]
    assert called == ["check-config", "smoke"]
    assert set(called) <= {command.name for command in COMMANDS}
