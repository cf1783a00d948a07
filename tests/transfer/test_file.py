"""The file connector and its folder: whole files, no way out, a limit."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import Geometry
from pdlaunch.transfer.connectors.connector import BlockRead, LocalMemory, PeerAgent, PushedRead
from pdlaunch.transfer.connectors.file import FileConnector, FileStore, file_name
from tests.transfer.fakes import layout_of

CPU = torch.device("cpu")
BLOCKS = torch.arange(256, dtype=torch.float32)
DIGESTS = [f"{index:064x}" for index in range(4)]


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(str(tmp_path / "kv"), 1_000_000)


def test_what_is_written_is_read(store: FileStore, tmp_path: Path) -> None:
    name = file_name(DIGESTS[0], "reader")
    store.write(name, BLOCKS)
    assert torch.equal(store.read(name, CPU), BLOCKS)
    assert [path.name for path in (tmp_path / "kv").iterdir()] == [DIGESTS[0]]
    assert len(list((tmp_path / "kv" / DIGESTS[0]).iterdir())) == 1, "no part of a file is left"


@given(
    name=st.text()
    | st.sampled_from(
        ["../x", "/etc/passwd", "a" * 64, f"{'a' * 64}/../../x", f"{'A' * 64}/{'b' * 64}", "."]
    )
)
def test_no_other_name_is_taken(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "names"
    store = FileStore(str(folder), 1_000_000)
    for use in (
        lambda: store.write(name, BLOCKS),
        lambda: store.read(name, CPU),
        lambda: store.remove(name),
    ):
        with pytest.raises(TransferError, match="is no name of a file of KV blocks"):
            use()
    assert list(folder.iterdir()) == []


def test_a_link_does_not_lead_out(store: FileStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "kv" / DIGESTS[0]).symlink_to(outside)
    name = file_name(DIGESTS[0], "reader")
    with pytest.raises(TransferError, match="leads out of"):
        store.write(name, BLOCKS)
    with pytest.raises(TransferError, match="leads out of"):
        store.read(name, CPU)
    assert list(outside.iterdir()) == []


def test_the_oldest_prompts_are_deleted_when_the_limit_is_passed(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path), 3 * 1200)
    for age_s, digest in zip((300, 100, 200), DIGESTS, strict=False):
        store.write(file_name(digest, "reader"), BLOCKS)
        os.utime(tmp_path / digest, (0, 10_000 - age_s))
    store.write(file_name(DIGESTS[3], "reader"), BLOCKS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [DIGESTS[1], DIGESTS[2], DIGESTS[3]]


def test_what_exceeds_the_limit_alone_is_refused(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path), 1000)
    with pytest.raises(TransferError, match=r"1024 bytes do not fit .* size_limit is 1000"):
        store.write(file_name(DIGESTS[0], "reader"), BLOCKS)
    assert list(tmp_path.iterdir()) == []


def test_missing_and_broken_files_are_told(store: FileStore, tmp_path: Path) -> None:
    name = file_name(DIGESTS[0], "reader")
    with pytest.raises(TransferError, match="cannot be read"):
        store.read(name, CPU)
    store.write(name, BLOCKS)
    path = next((tmp_path / "kv" / DIGESTS[0]).iterdir())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TransferError, match="cannot be read"):
        store.read(name, CPU)


def test_files_are_whole_whenever_they_are_there(store: FileStore) -> None:
    name = file_name(DIGESTS[0], "reader")
    store.write(name, torch.zeros(50_000))
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(
            lambda: [
                store.write(name, torch.full((50_000,), float(number))) for number in range(100)
            ]
        )
        while not writing.done():
            found = store.read(name, CPU)
            assert torch.equal(found, found[:1].expand(50_000))
        writing.result()


def test_a_write_that_fails_leaves_nothing_behind(store: FileStore, tmp_path: Path) -> None:
    name = file_name(DIGESTS[0], "reader")
    in_its_place = tmp_path / "kv" / f"{name}.safetensors"
    in_its_place.mkdir(parents=True)
    with pytest.raises(TransferError, match="cannot be written"):
        store.write(name, BLOCKS)
    assert list(in_its_place.parent.iterdir()) == [in_its_place]


class RecordingStore(FileStore):
    """Reads nothing, and remembers where to it should have."""

    def __init__(self, folder: str, size_limit_bytes: int) -> None:
        super().__init__(folder, size_limit_bytes)
        self.devices: list[torch.device] = []

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        self.devices.append(device)
        raise TransferError("no such device here")


class RecordingConnector(FileConnector):
    def _start(self, memory: LocalMemory) -> None:
        self.store = RecordingStore(self._directory, self._size_limit_bytes)


class TensorElsewhere:
    """A KV cache on ``cuda:2``."""

    device = torch.device("cuda:2")


def test_blocks_are_loaded_to_the_device_of_the_kv_cache_and_to_no_assumed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    connector = RecordingConnector(
        "decode-0/rank-0",
        1,
        directory=str(tmp_path),
        size_limit_bytes=1,
        num_sender_threads=1,
    )
    connector.open(LocalMemory(cast(torch.Tensor, TensorElsewhere()), torch.zeros(1), layout_of()))
    peer = PeerAgent(
        "prefill-0/rank-0#1",
        b"prefill-0/rank-0#1",
        cast(Geometry, SimpleNamespace(scratch_bytes=1)),
    )
    read = connector.connect(peer).read(
        BlockRead([1], [2], range(3), range(3), digest=DIGESTS[0], reader="x")
    )
    assert isinstance(read, PushedRead)
    read.end("")
    assert read.poll() == "failed"
    assert connector.store.devices == [torch.device("cuda:2")]
    connector.close()
