"""Connectors of other packages: ``example`` is found through the entry point of its package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdlaunch.config import connectors
from pdlaunch.config.kv_transfer import KVTransferSettings
from tests.transfer.conftest import Start

EXAMPLE = Path(__file__).parent / "example"


@pytest.fixture
def _example(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the package look installed for this process and its children."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    forget_connectors()
    yield
    monkeypatch.undo()
    forget_connectors()


def forget_connectors() -> None:
    connectors._others.cache_clear()
    connectors.other_sections.cache_clear()


@pytest.mark.processes
@pytest.mark.usefixtures("_example")
def test_a_pull_over_a_connector_of_another_package(start: Start) -> None:
    transfer = {"connector": "example"}
    holder, puller = (start(role, transfer=transfer) for role in ("prefill", "decode"))
    assert puller.connect(holder)[0].path == "example/process_vm_readv"
    puller.pull_from(holder, "r")


@pytest.mark.usefixtures("_example")
def test_its_section_is_checked_with_its_own_model() -> None:
    settings = KVTransferSettings(connector="example", example={"max_read_bytes": "2KiB"})
    assert settings.section("example").model_dump() == {"max_read_bytes": 2048}
    again = KVTransferSettings.model_validate_json(settings.model_dump_json())
    assert again.section("example") == settings.section("example")
    with pytest.raises(ValueError, match=r"example\.max_bytes"):
        KVTransferSettings(example={"max_bytes": 1})


def pdlaunch(
    *arguments: str, path: Path = EXAMPLE, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run a command that can use the packages in ``path``, and must not import torch."""
    program = (
        "import sys; from pdlaunch.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    found = os.pathsep.join([str(path), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": found, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.processes
def test_what_cannot_be_imported_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise OSError('no library')\n")
    metadata = tmp_path / "broken-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[pdlaunch.connectors]\nbroken = broken:SPEC\n")
    arguments = ("check-config", "--kv-connector", "broken", "--device", "cpu")
    checked = pdlaunch(*arguments, path=tmp_path)
    assert checked.returncode == 2, checked.stderr
    assert "kv_transfer.connector" in checked.stderr
    assert "cannot be imported from broken:SPEC: OSError: no library" in checked.stderr
    unused = pdlaunch("check-config", "--device", "cpu", path=tmp_path)
    assert unused.returncode == 0, unused.stderr
