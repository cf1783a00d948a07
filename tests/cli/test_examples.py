"""Every example is a configuration without errors, and the workflow calls commands that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pdlaunch.cli.app import COMMANDS
from pdlaunch.config.sources import load_config

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("name", ["demo.yaml", "two_by_two.yaml", "tensor_parallel.yaml"])
@pytest.mark.processes
def test_examples_are_clean(name: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pdlaunch",
        "check-config",
        str(EXAMPLES / name),
        "--assume",
        "cpu",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("document", ["README.md", "docs/offload.md"])
def test_configurations_in_the_documents_can_be_read(document: str, tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    path = tmp_path / "deploy.yaml"
    path.write_text(block)
    load_config(path, {}, {})


def test_the_workflow_calls_commands_that_exist() -> None:
    workflow = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())
    lines = [
        line
        for step in workflow["jobs"]["smoke"]["steps"]
        for line in step.get("run", "").splitlines()
    ]
    called = [line.split()[1] for line in lines if line.startswith("pdlaunch ")]
    assert called == ["check-config", "smoke"]
    assert set(called) <= {command.name for command in COMMANDS}
