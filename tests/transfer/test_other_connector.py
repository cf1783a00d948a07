"""Connectors of other packages: ``example`` is found through the entry point of its package."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdlaunch.config import connectors
from pdlaunch.config.kv_transfer import KVTransferSettings
from tests.command_line import invoke
from tests.transfer.conftest import Start

EXAMPLE = Path(__file__).parents[2] / "examples" / "connector"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Make a package look installed for this process and its children."""

    def forget_connectors() -> None:
        connectors._others.cache_clear()
        connectors.other_sections.cache_clear()

    def add(folder: Path) -> None:
        monkeypatch.syspath_prepend(str(folder))
        forget_connectors()

    yield add
    monkeypatch.undo()
    forget_connectors()


@pytest.mark.processes
def test_a_pull_over_a_connector_of_another_package(
    install: Callable[[Path], None], start: Start
) -> None:
    install(EXAMPLE)
    transfer = {"connector": "example"}
    holder, puller = (start(role, transfer=transfer) for role in ("prefill", "decode"))
    assert puller.connect(holder)[0].path == "example/memory"
    puller.pull_from(holder, "r")


def test_its_section_is_checked_with_its_own_model(install: Callable[[Path], None]) -> None:
    install(EXAMPLE)
    settings = KVTransferSettings(connector="example", example={"max_read_bytes": "2KiB"})
    assert settings.section("example").model_dump() == {"max_read_bytes": 2048}
    again = KVTransferSettings.model_validate_json(settings.model_dump_json())
    assert again.section("example") == settings.section("example")
    with pytest.raises(ValueError, match=r"example\.max_bytes"):
        KVTransferSettings(example={"max_bytes": 1})


def test_what_cannot_be_imported_is_refused_by_name(
    install: Callable[[Path], None], tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("raise OSError('no library')\n")
    metadata = tmp_path / "broken-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[pdlaunch.connectors]\nbroken = broken:SPEC\n")
    install(tmp_path)
    checked = invoke(["check-config", "--kv-connector", "broken", "--device", "cpu"])
    assert checked.exit_code == 2, checked.output
    assert "kv_transfer.connector" in checked.stderr
    assert "cannot be imported from broken:SPEC: OSError: no library" in checked.stderr
    unused = invoke(["check-config", "--device", "cpu"])
    assert unused.exit_code == 0, unused.output
