from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import invoke


@pytest.mark.processes
@pytest.mark.parametrize("option", ["--junit", "--report"])
def test_a_report_that_cannot_be_written_is_told_in_words(tmp_path: Path, option: str) -> None:
    (tmp_path / "file").touch()
    report = tmp_path / "file" / "smoke.xml"
    result = invoke(["smoke", "--model", "no-such-model", option, str(report)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {option} {report} cannot be written: ")
    assert "FAILED  the deployment gets ready" in result.stdout
