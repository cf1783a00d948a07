from __future__ import annotations

from pathlib import Path

import pytest

from pdlaunch.machine.availability import why_not_writable
from tests.capabilities import without_capabilities


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


def test_what_may_not_be_written(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with without_capabilities():
        for path in (closed, closed / "new"):
            assert why_not_writable(str(path)) == f"this user may not write to {closed}"


def test_what_nobody_can_make_not_even_root() -> None:
    said = why_not_writable("/proc/nope/deep")
    assert said is not None
    assert said.startswith("/proc/nope/deep cannot be made: /proc takes nothing new: ")
    said = why_not_writable("/proc")
    assert said is not None
    assert said.startswith("/proc takes nothing new: ")


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "", "\udcff"])
def test_strange_names_are_no_reason_to_raise(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (why_not_writable(path) is None) == (path in ("", "\udcff"))
    assert list(tmp_path.iterdir()) == []
