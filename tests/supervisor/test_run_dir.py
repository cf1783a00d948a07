from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from pdlaunch.process.run_dirs import PREFIX
from pdlaunch.supervisor.run_dir import new_run_dir, remove_stale_run_dirs


def test_it_is_private_and_gone_at_the_end(tmp_path: Path) -> None:
    with new_run_dir(tmp_path) as run_dir:
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        (run_dir / "control").touch()
    assert not run_dir.exists()


def test_what_a_dead_launch_left_is_removed_and_what_lives_stays(tmp_path: Path) -> None:
    dead = tmp_path / f"{PREFIX}dead"
    dead.mkdir()
    (dead / "lock").touch()
    with new_run_dir(tmp_path) as run_dir:
        assert not dead.exists()
        assert remove_stale_run_dirs(tmp_path) == []
        assert run_dir.exists()


def test_a_folder_without_a_lock_is_stale_once_it_is_old(tmp_path: Path) -> None:
    folder = tmp_path / f"{PREFIX}new"
    folder.mkdir()
    assert remove_stale_run_dirs(tmp_path) == []
    os.utime(folder, (time.time() - 3600,) * 2)
    assert remove_stale_run_dirs(tmp_path) == [folder]


def test_links_and_files_are_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    (tmp_path / f"{PREFIX}file").touch()
    assert remove_stale_run_dirs(tmp_path) == []


def test_sockets_inside_have_short_enough_paths() -> None:
    with new_run_dir() as run_dir:
        assert len(os.fsencode(run_dir / ("x" * 60))) <= 107
