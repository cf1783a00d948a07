"""The example of the Python API starts a deployment, gets an answer, and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import default_environ

EXAMPLE = Path(__file__).parents[2] / "examples" / "launch.py"


def test_the_example_launches_and_is_answered(llama: Path) -> None:
    environ = default_environ() | {"PDLAUNCH_MODEL": str(llama), "PDLAUNCH_DTYPE": "float32"}
    result = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, env=environ, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    _, planned, answer = result.stdout.partition("5 processes\n")
    assert planned
    assert answer.strip()
