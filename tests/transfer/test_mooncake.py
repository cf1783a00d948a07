"""Properties of Mooncake alone: missing libraries, and transfers between GPUs."""

from __future__ import annotations

import sys

import pytest
import torch

from pdlaunch.bench.transfer import TransferOptions, bench_transfer
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors.connector import LocalMemory, new_connector
from pdlaunch.transfer.regions import native_regions
from tests.transfer.fakes import layout_of, random_cache


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import fails, for example without libibverbs1, and the rank does not start."""
    monkeypatch.setitem(sys.modules, "mooncake", None)
    settings = KVTransferSettings(connector="mooncake")
    connector = new_connector(settings, "prefill-0/rank-0", 1)
    memory = LocalMemory(
        native_regions(random_cache(layout_of(), 1, seed=0), layout_of()), torch.zeros(1)
    )
    with pytest.raises(
        TransferError,
        match=r"Mooncake cannot be imported: .* install mooncake-transfer-engine .*libibverbs1",
    ):
        connector.open(memory)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_transfer() -> None:
    """Every pull is verified by checksums; a failed pull raises."""
    mooncake = pytest.importorskip("mooncake.engine")
    if not mooncake.SUPPORT_CUDA:
        pytest.skip("this build of Mooncake has no CUDA")
    options = TransferOptions(
        paths=["mooncake"], num_blocks=[16], num_repeats=2, num_kv_heads=2, device="cuda"
    )
    assert float(bench_transfer(options)[0]["pull_gb_per_s"]) > 0
