"""The file connector and its folder: whole files, no access outside of the folder, a limit."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors.file import FileStore

CPU = torch.device("cpu")
BLOCKS = torch.arange(256, dtype=torch.float32)
DIGESTS = [f"{index:064x}" for index in range(4)]
NAMES = [f"{digest}/{'b' * 64}" for digest in DIGESTS]


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(str(tmp_path / "kv"), 1_000_000)


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
        with pytest.raises(TransferError, match="is not a valid name for a file of KV blocks"):
            use()
    assert list(folder.iterdir()) == []


def test_a_link_does_not_lead_out(store: FileStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "kv" / DIGESTS[0]).symlink_to(outside)
    name = NAMES[0]
    with pytest.raises(TransferError, match="leads out of"):
        store.write(name, BLOCKS)
    with pytest.raises(TransferError, match="leads out of"):
        store.read(name, CPU)
    assert list(outside.iterdir()) == []


def test_the_oldest_prompts_are_deleted_when_the_limit_is_passed(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path), 3 * 1200)
    for age_s, digest, name in zip((300, 100, 200), DIGESTS, NAMES, strict=False):
        store.write(name, BLOCKS)
        os.utime(tmp_path / digest, (0, 10_000 - age_s))
    store.write(NAMES[3], BLOCKS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [DIGESTS[1], DIGESTS[2], DIGESTS[3]]


def test_what_exceeds_the_limit_alone_is_refused(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path), 1000)
    with pytest.raises(TransferError, match=r"1024 bytes do not fit .* size_limit is 1000"):
        store.write(NAMES[0], BLOCKS)
    assert list(tmp_path.iterdir()) == []


def test_files_are_whole_whenever_they_are_there(store: FileStore) -> None:
    name = NAMES[0]
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
    name = NAMES[0]
    in_its_place = tmp_path / "kv" / f"{name}.safetensors"
    in_its_place.mkdir(parents=True)
    with pytest.raises(TransferError, match="cannot be written"):
        store.write(name, BLOCKS)
    assert list(in_its_place.parent.iterdir()) == [in_its_place]
