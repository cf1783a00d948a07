"""Defines what vLLM loads: ``{"kv_connector": "VerifiedNixlConnector", "kv_connector_module_path":
"pdlaunch.vllm.connector"}``. Both sides of a pair must have it, on one host or with sidecars of
pdlaunch that bring statements from one to the other.

``statements_dir`` in ``kv_connector_extra_config``, or PDLAUNCH_STATEMENTS_DIR in the environment,
names the folder of the statements, the same one for all engines.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import (
    NixlBaseConnector,
    NixlPullConnector,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (
    NixlPullConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from pdlaunch.vllm.agent import new_agent
from pdlaunch.vllm.far_statements import FarStatements
from pdlaunch.vllm.statements import StatementBoard
from pdlaunch.vllm.support import SUPPORTED_VERSIONS, is_supported, refusal, refused
from pdlaunch.vllm.worker import ProvingWorker, StatingScheduler

STATEMENTS_DIR = "PDLAUNCH_STATEMENTS_DIR"
LOCAL_TRANSPORTS = {"cpu": "posix,cma,self", "cuda": "cuda_ipc,cuda_copy,posix,cma,self"}


class _Scheduler(StatingScheduler, NixlPullConnectorScheduler):  # type: ignore[misc]
    pass


class _Worker(ProvingWorker, NixlPullConnectorWorker):  # type: ignore[misc]
    pass


class VerifiedNixlConnector(NixlPullConnector):  # type: ignore[misc]
    """Moves blocks as NixlConnector does, and proves them before they are used."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Raises RuntimeError, ValueError for what cannot be proven."""
        if not is_supported(vllm.__version__):
            raise RuntimeError(
                f"pdlaunch.vllm.connector is for vLLM {', '.join(SUPPORTED_VERSIONS)}, this is "
                f"{vllm.__version__}: use NixlConnector (kv_transfer.verify: off)"
            )
        # Not that of NixlPullConnector, which makes the plain scheduler and worker.
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        arguments = vllm_config, self.engine_id, kv_cache_config
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = _Scheduler(*arguments)
            return
        transfer = vllm_config.kv_transfer_config
        board = StatementBoard(_statements_dir(transfer.get_from_extra_config))
        with _agents_without_listener():
            self.connector_worker = _Worker(
                board, FarStatements.from_environment(board), *arguments
            )
        if reason := refusal(self.connector_worker):
            raise refused(reason)

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self.connector_scheduler.kv_cache_manager = kv_cache_manager

    def wait_for_save(self) -> None:
        super().wait_for_save()
        self.connector_worker.state_prompts(self._connector_metadata)


def _statements_dir(extra: Any) -> Path:
    """Return the folder of the statements. Raises ValueError unless this user alone can open it."""
    name = extra("statements_dir", None) or os.environ.get(STATEMENTS_DIR)
    if not name:
        raise ValueError(
            "kv_connector_extra_config.statements_dir is missing: the folder, of mode 0700, in "
            "which the engines of this host leave what they state about their KV blocks"
        )
    folder = Path(name)
    found = folder.stat()
    if not folder.is_dir() or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ValueError(f"statements_dir {folder} must be a folder of this user with mode 0700")
    return folder


@contextlib.contextmanager
def _agents_without_listener() -> Iterator[None]:
    """Have vLLM make NIXL agents that open nothing; it has no seam for that."""
    plain = base_worker.NixlWrapper

    def make(name: str, config: Any) -> Any:
        from nixl import _api, _bindings

        # vLLM takes bytes and seconds of its metrics from the telemetry.
        return new_agent(
            _api,
            _bindings,
            name,
            num_threads=config.num_threads,
            captures_telemetry=config.capture_telemetry,
        )

    os.environ.setdefault("UCX_TLS", LOCAL_TRANSPORTS["cpu" if _device_type() == "cpu" else "cuda"])
    base_worker.NixlWrapper = make
    try:
        yield
    finally:
        base_worker.NixlWrapper = plain


def _device_type() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_type)
