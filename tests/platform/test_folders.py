from __future__ import annotations

from pathlib import Path

import pytest

from pdlaunch.platform.availability import why_not_writable


def test_a_folder_that_is_there_or_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why_not_writable(str(tmp_path)) is None
    assert why_not_writable(str(tmp_path / "new" / "deep")) is None
    monkeypatch.chdir(tmp_path)
    assert why_not_writable("relative") is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in ("file", "file/below"):
        assert why_not_writable(str(tmp_path / path)) == f"{tmp_path / 'file'} is no folder"
    assert why_not_writable(str(tmp_path / "link")) == f"{tmp_path / 'link'} is a link to nothing"


def test_what_belongs_to_others(tmp_path: Path) -> None:
    asked = []

    def refuse(path: Path, mode: int) -> bool:
        asked.append(path)
        return False

    for path in (tmp_path, tmp_path / "new"):
        assert why_not_writable(str(path), refuse) == f"this user may not write to {tmp_path}"
    assert asked == [tmp_path, tmp_path]


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "", "\udcff"])
def test_strange_names_are_no_reason_to_raise(path: str) -> None:
    assert why_not_writable(path) is None or why_not_writable(path)
