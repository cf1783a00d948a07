"""Says which vLLM the connector is written for, and which engines it refuses."""

from __future__ import annotations

from typing import Any

# Major and minor versions: the connector relies on parts of NixlConnector that vLLM may change.
SUPPORTED_VERSIONS = ("0.32",)
LAYOUT = "LBHNC"


def is_supported(version: str) -> bool:
    """Return whether the connector is written for a version of vLLM, ``0.32.0+cpu``."""
    return ".".join(version.split(".")[:2]) in SUPPORTED_VERSIONS


def refused(reason: str) -> ValueError:
    """Return the error with which an engine does not start."""
    return ValueError(
        f"KV blocks of this engine cannot be verified: {reason}; use NixlConnector "
        "(kv_transfer.verify: off)"
    )


def refusal(worker: Any) -> str:
    """Return why blocks of an engine cannot be proven; empty: they can.

    ``worker``: vLLM's NixlBaseConnectorWorker.
    """
    # vLLM 0.32 drops reports of failed loads where there are several groups of layers.
    if worker._is_hma_required or len(worker.kv_cache_config.kv_cache_groups) != 1:
        return (
            "the model is a hybrid: its layers keep KV in several ways (sliding windows, state "
            "spaces), and vLLM drops reports of failed loads for these"
        )
    if worker.use_mla:
        return "the model has multi-head latent attention, whose KV has no heads"
    if worker.use_host_buffer:
        return "its KV passes through a buffer in host memory (kv_buffer_device)"
    if worker.kv_cache_layout != LAYOUT:
        return f"its KV cache has the layout {worker.kv_cache_layout}, not {LAYOUT}"
    if worker._physical_blocks_per_logical_kv_block != 1:
        return "its attention kernel has smaller blocks than its KV cache"
    if max(worker.pp_size, worker.pcp_size, worker.dcp_size) > 1:
        return "pipeline or context parallelism splits its KV between ranks"
    if worker._bidirectional_kv_xfer_enabled:
        return "bidirectional_kv_xfer reads blocks of decode engines, which state nothing"
    if list(worker.nixl_backends) != ["UCX"]:
        return f"backends {worker.nixl_backends}: without a listener there is UCX alone"
    return ""
