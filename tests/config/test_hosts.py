"""Hosts as settings: names alone, or mappings with what is known of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdlaunch.config.problems import InvalidConfigError
from pdlaunch.config.sources import load_config


def hosts_of(path: Path, text: str) -> tuple[tuple[str, tuple[str, ...] | None], ...]:
    path.write_text(f"placement: hosts\nhosts: {text}\n")
    return tuple((host.name, host.roles) for host in load_config(path, {}, {}).config.hosts)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deploy.yaml"


@pytest.mark.parametrize("roles", ["[prefill, both]", "'prefill,both'", "\n  - prefill\n  - both"])
def test_roles_of_a_host_are_a_list_or_words(file: Path, roles: str) -> None:
    block = roles.replace("\n", "\n    ")
    assert hosts_of(file, f"\n  - name: a\n    roles: {block}\n  - b") == (
        ("a", ("prefill", "both")),
        ("b", None),
    )


@pytest.mark.parametrize("roles", ["[prefill, {both: 1}]", "[prefill, null]", "[nonsense]"])
def test_other_roles_are_refused_at_their_place(file: Path, roles: str) -> None:
    with pytest.raises(InvalidConfigError) as raised:
        hosts_of(file, f"\n- {{name: b}}\n- {{name: a, roles: {roles}}}")
    assert "'prefill'" in str(raised.value)
    assert f"{file}:4:" in str(raised.value)


@pytest.mark.parametrize("settings", ["hosts: [a]", "placement: hosts", "placement: ray\nhosts: a"])
def test_hosts_and_their_placement_go_together(file: Path, settings: str) -> None:
    file.write_text(settings)
    with pytest.raises(InvalidConfigError) as raised:
        load_config(file, {}, {})
    assert [problem.field for problem in raised.value.problems] == ["hosts"]
