"""Mooncake's own sides: merged pieces, and transfers between GPUs."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.bench.transfer import TransferOptions, bench_transfer
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors.connector import LocalMemory
from pdlaunch.transfer.connectors.mooncake import _engine_protocol, _merge
from pdlaunch.transfer.connectors.opening import new_connector
from tests.transfer.fakes import layout_of, random_cache

BLOCKS = st.lists(st.integers(0, 12), min_size=1, max_size=12, unique=True)


@given(sources=BLOCKS, targets=BLOCKS)
def test_merged_pieces_move_the_same_bytes(sources: list[int], targets: list[int]) -> None:
    count, size = min(len(sources), len(targets)), 3
    ours, theirs = ([block * size for block in blocks[:count]] for blocks in (sources, targets))
    wanted = [
        (source + i, target + i)
        for source, target in zip(ours, theirs, strict=True)
        for i in range(size)
    ]
    merged = list(_merge(ours, theirs, size))
    assert [
        (source + i, target + i) for source, target, length in merged for i in range(length)
    ] == wanted


def test_a_build_without_nvlink_is_told() -> None:
    assert _engine_protocol("tcp", {}) == "tcp"
    assert _engine_protocol("nvlink", {"SUPPORT_MNNVL": True}) == "nvlink"
    assert (
        _engine_protocol("nvlink", {"SUPPORT_INTRA_NVLINK": True, "SUPPORT_MNNVL": True})
        == "nvlink_intra"
    )
    with pytest.raises(TransferError, match="no NVLink transport"):
        _engine_protocol("nvlink", {"SUPPORT_MNNVL": False})


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where libibverbs1 is missing: the import fails, and the rank does not start."""
    monkeypatch.setitem(sys.modules, "mooncake", None)
    settings = KVTransferSettings(connector="mooncake")
    connector = new_connector(settings, "prefill-0/rank-0", 1)
    memory = LocalMemory(random_cache(layout_of(), 1, seed=0), torch.zeros(1), layout_of())
    with pytest.raises(
        TransferError,
        match=r"Mooncake cannot be imported: .* install mooncake-transfer-engine .*libibverbs1",
    ):
        connector.open(memory)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_transfer() -> None:
    """Every pull is verified by its checksums, and one that fails raises."""
    mooncake = pytest.importorskip("mooncake.engine")
    if not mooncake.SUPPORT_CUDA:
        pytest.skip("this build of Mooncake has no CUDA")
    options = TransferOptions(
        connectors=["mooncake"], num_blocks=[16], num_repeats=2, num_kv_heads=2, device="cuda"
    )
    assert float(bench_transfer(options)[0]["pull_gb_per_s"]) > 0
