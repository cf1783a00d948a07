from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdlaunch.cli.app import build_app


@pytest.mark.parametrize("option", ["--junit", "--report"])
@pytest.mark.processes
def test_a_report_that_cannot_be_written_is_told_in_words(tmp_path: Path, option: str) -> None:
    (tmp_path / "file").touch()
    report = tmp_path / "file" / "smoke.xml"
    arguments = ["smoke", "--model", "no-such-model", option, str(report)]
    result = CliRunner().invoke(build_app(arguments), arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {option} {report} cannot be written: ")
    assert "FAILED  the deployment gets ready" in result.stdout
