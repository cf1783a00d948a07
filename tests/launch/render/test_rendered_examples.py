"""Rendered examples are what the command prints today."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from tests.launch.render.manifests import ROOT, check_schema, run


@pytest.fixture(scope="module", autouse=True)
def _converted() -> None:
    """Convert the demo model: memory is requested of a model whose shape is known."""
    command = [sys.executable, "-m", "pdlaunch.engine.models.convert", "smollm2", "--if-needed"]
    subprocess.run(command, check=True, timeout=240)


@pytest.mark.processes
def test_rendered_examples_are_up_to_date() -> None:
    folder = ROOT / "examples" / "kubernetes"
    result = run("kubernetes", str(folder / "deployment.yaml"), "--assume", "cpu", trusted=False)
    assert result.exit_code == 0, result.output
    assert (folder / "objects.yaml").read_text() == result.stdout
    check_schema(list(yaml.safe_load_all(result.stdout)))
