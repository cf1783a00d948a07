"""What shells are offered, over the protocol of the completion scripts that typer installs."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdlaunch.cli.app import build_app


@pytest.fixture
def offered(monkeypatch):
    def complete(line: str) -> list[str]:
        """What bash is offered at the end of ``line``."""
        words = line.split(" ")
        monkeypatch.setenv("_PDLAUNCH_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        # The shell's script gives no arguments.
        result = CliRunner().invoke(build_app([]), [], prog_name="pdlaunch")
        assert result.exit_code == 0, result.output
        return result.stdout.split()

    return complete


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pdlaunch check-c", ["check-config"]),
        ("pdlaunch serve --dtype ", ["auto", "float32", "bfloat16", "float16"]),
        ("pdlaunch serve --dtype b", ["bfloat16"]),
        ("pdlaunch check-config --log-level w", ["warning"]),
        ("pdlaunch config show --device cu", ["cuda"]),
        ("pdlaunch bench serve --kv-connector mo", ["mooncake"]),
        ("pdlaunch smoke --model smo", ["smollm2"]),
        ("pdlaunch serve smo", ["smollm2"]),
        ("pdlaunch check-config --format g", ["github"]),
        ("pdlaunch explain PD20", [f"PD20{n}" for n in range(1, 10)]),
        ("pdlaunch explain pd203", ["pd203"]),
        ("pdlaunch serve --host ", []),
        ("pdlaunch serve --tensor", ["--tensor-parallel-size"]),
    ],
)
def test_values_are_offered(offered, line, expected):
    found = offered(line)
    # Rules are added over time.
    assert found == expected or (line.endswith("PD20") and set(found) <= set(expected) and found)


def test_a_folder_and_a_file_are_offered_as_models(
    offered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smol").mkdir()
    (tmp_path / "smol.gguf").touch()
    (tmp_path / "smol.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert offered("pdlaunch serve --model smo") == ["smollm2", "smol/", "smol.gguf"]
    assert offered(f"pdlaunch serve --model {tmp_path}/smol.") == [f"{tmp_path}/smol.gguf"]
    assert offered("pdlaunch serve --model nowhere/") == []
