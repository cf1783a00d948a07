from __future__ import annotations

from pathlib import Path

import pytest

from pdlaunch.config.models import LaunchConfig
from pdlaunch.supervisor.log_dirs import (
    KEPT_LAUNCHES,
    SUPERVISOR_LOG,
    keep,
    new_launch_id,
    new_log_dir,
    prune,
)


def make_folders(folder: Path, count: int) -> list[Path]:
    """Of launches that have ended, oldest first."""
    paths = [folder / f"20260101-{number:06d}-abcdef" for number in range(count)]
    for path in paths:
        path.mkdir(parents=True)
        (path / SUPERVISOR_LOG).write_text("stopped\n")
    return paths


def test_the_latest_are_kept(tmp_path: Path) -> None:
    folders = make_folders(tmp_path, 5)
    assert prune(tmp_path, 3) == folders[:2]
    assert sorted(tmp_path.iterdir()) == folders[2:]
    assert prune(tmp_path, 3) == []


def test_a_launch_that_runs_keeps_its_folder_however_old_it_is(tmp_path: Path) -> None:
    folders = make_folders(tmp_path, 5)
    with keep(folders[0]), keep(folders[0]):
        assert prune(tmp_path, 2) == folders[1:3]
        assert folders[0].exists()
    assert prune(tmp_path, 2) == folders[:1]


def test_what_is_no_folder_of_a_launch_stays(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    logs = tmp_path / "logs"
    (logs / "mine").mkdir(parents=True)
    (logs / "20250101-000000-abcdef").symlink_to(outside)
    folders = make_folders(logs, 2)
    assert prune(logs, 1) == folders[:1]
    assert {path.name for path in logs.iterdir()} == {
        "mine",
        "20250101-000000-abcdef",
        folders[1].name,
    }
    assert outside.exists()


def test_a_folder_without_a_log_is_left_over_too(tmp_path: Path) -> None:
    folders = make_folders(tmp_path, 2)
    (folders[0] / SUPERVISOR_LOG).unlink()
    assert prune(tmp_path, 1) == folders[:1]


def test_a_new_launch_prunes_the_cache_and_never_a_folder_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDLAUNCH_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "own"
    make_folders(own, KEPT_LAUNCHES + 5)
    new_log_dir(LaunchConfig(log_dir=str(own / "new")), new_launch_id())
    assert len(list(own.iterdir())) == KEPT_LAUNCHES + 6
    make_folders(tmp_path / "cache" / "logs", KEPT_LAUNCHES + 5)
    new = new_log_dir(LaunchConfig(), new_launch_id())
    assert len(list(new.parent.iterdir())) == KEPT_LAUNCHES
    assert new.exists()
