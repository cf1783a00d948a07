from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pdlaunch.vllm.statements import StatementBoard
from pdlaunch.vllm.support import is_supported, refusal
from tests.vllm_room.test_worker import Worker

FINE = {
    "_is_hma_required": False,
    "kv_cache_config": SimpleNamespace(kv_cache_groups=["all layers"]),
    "use_mla": False,
    "use_host_buffer": False,
    "kv_cache_layout": "LBHNC",
    "_physical_blocks_per_logical_kv_block": 1,
    "pp_size": 1,
    "pcp_size": 1,
    "dcp_size": 1,
    "_bidirectional_kv_xfer_enabled": False,
    "nixl_backends": ["UCX"],
}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"_is_hma_required": True}, "a hybrid"),
        ({"kv_cache_config": SimpleNamespace(kv_cache_groups=["full", "window"])}, "a hybrid"),
        ({"use_mla": True}, "latent attention"),
        ({"use_host_buffer": True}, "kv_buffer_device"),
        ({"kv_cache_layout": "LBNHC"}, "layout LBNHC"),
        ({"_physical_blocks_per_logical_kv_block": 2}, "smaller blocks"),
        ({"pp_size": 2}, "parallelism"),
        ({"dcp_size": 2}, "parallelism"),
        ({"_bidirectional_kv_xfer_enabled": True}, "bidirectional_kv_xfer"),
        ({"nixl_backends": ["LIBFABRIC"]}, "UCX alone"),
    ],
)
def test_engines_whose_blocks_cannot_be_proven_are_refused_by_name(
    changed: dict[str, object], reason: str
) -> None:
    found = refusal(SimpleNamespace(**FINE | changed))
    assert reason in found
    assert bool(found) == bool(reason)


def test_versions() -> None:
    assert [is_supported(version) for version in ("0.32.0", "0.32.11+cpu", "0.32.0rc1")] == [
        True
    ] * 3
    assert not any(map(is_supported, ("0.3", "0.31.9", "0.320.0", "1.32.0", "dev")))


def test_a_cache_of_another_shape_names_the_setting(tmp_path: Path) -> None:
    worker = Worker(StatementBoard(tmp_path), None, "engine", 0, 1)
    with pytest.raises(ValueError, match=r"kv_transfer\.verify: off"):
        worker.register_kv_caches({"layer": torch.zeros(4, 4)})
