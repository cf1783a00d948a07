"""Folders of a launch are private, kept while it lives, and removed afterwards."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdlaunch.config.models import LaunchConfig
from pdlaunch.launch.launch import (
    KEPT_LAUNCHES,
    SUPERVISOR_LOG,
    keep_logs,
    new_log_dir,
    prune_logs,
)
from pdlaunch.protocol.process.run_dirs import (
    PREFIX,
    LaunchCard,
    new_launch_id,
    new_run_dir,
    remove_stale_run_dirs,
    running_launches,
    take_lock,
)

CARD = LaunchCard(launch_id="id", url="http://127.0.0.1:8000")


def make_folders(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"20260101-{number:06d}-abcdef" for number in range(count)]
    for path in paths:
        path.mkdir(parents=True)
        (path / SUPERVISOR_LOG).write_text("stopped\n")
    return paths


def make_old(folder: Path) -> None:
    os.utime(folder, (time.time() - 3600,) * 2)


# Logs


def test_the_latest_logs_are_kept_and_those_of_a_launch_that_runs(tmp_path: Path) -> None:
    folders = make_folders(tmp_path / "logs", 5)
    outside, link = tmp_path / "outside", tmp_path / "logs" / "20250101-000000-abcdef"
    outside.mkdir()
    link.symlink_to(outside)
    (link.parent / "mine").mkdir()
    with keep_logs(folders[0]), keep_logs(folders[0]):
        assert prune_logs(link.parent, 2) == folders[1:3]
    assert prune_logs(link.parent, 2) == folders[:1]
    assert set(link.parent.iterdir()) == {*folders[3:], link, link.parent / "mine"}
    assert outside.exists()


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


# Run directories


def test_it_is_private_short_and_gone_at_the_end(tmp_path: Path) -> None:
    with new_run_dir(tmp_path) as run_dir:
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        (run_dir / "control").touch()
    assert not run_dir.exists()
    with new_run_dir() as run_dir:  # Paths of sockets have at most 107 bytes.
        assert len(os.fsencode(run_dir / ("x" * 60))) <= 107


def test_others_that_clean_up_meanwhile_leave_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two agents of one machine may start at the same instant."""
    removed: list[Path] = []

    def take_lock_late(descriptor: int) -> None:
        removed.extend(remove_stale_run_dirs(tmp_path))
        take_lock(descriptor)

    monkeypatch.setattr("pdlaunch.protocol.process.run_dirs.take_lock", take_lock_late)
    with new_run_dir(tmp_path) as run_dir:
        removed.extend(remove_stale_run_dirs(tmp_path))
        assert run_dir.exists()
    assert removed == []


def test_a_folder_in_use_whose_lock_file_a_cleaner_has_taken_is_found_and_stays(
    tmp_path: Path,
) -> None:
    with new_run_dir(tmp_path) as run_dir:
        CARD.write(run_dir)
        (run_dir / "lock").unlink()
        make_old(run_dir)
        assert [launch.run_dir for launch in running_launches(tmp_path)] == [run_dir]
        with new_run_dir(tmp_path):
            assert run_dir.exists()


DIES = """
import os, sys
from pathlib import Path
from pdlaunch.protocol.process.run_dirs import new_run_dir

with new_run_dir(Path(sys.argv[1])):
    os.kill(os.getpid(), 9)
"""


@pytest.mark.processes
@pytest.mark.parametrize("has_file", [True, False])
def test_the_folder_of_an_owner_that_died_is_removed(tmp_path: Path, has_file: bool) -> None:
    subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], check=False)
    [folder] = tmp_path.iterdir()
    if not has_file:
        (folder / "lock").unlink()
    CARD.write(folder)
    make_old(folder)
    assert running_launches(tmp_path) == []
    assert remove_stale_run_dirs(tmp_path) == [folder]
    assert not folder.exists()


def test_old_folders_without_a_lock_are_removed_and_links_and_files_stay(tmp_path: Path) -> None:
    folder, target = tmp_path / f"{PREFIX}new", tmp_path / "elsewhere"
    folder.mkdir()
    target.mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    (tmp_path / f"{PREFIX}file").touch()
    assert remove_stale_run_dirs(tmp_path) == []
    make_old(folder)
    assert remove_stale_run_dirs(tmp_path) == [folder]
