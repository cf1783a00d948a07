"""Reaches into the KV cache of an engine of vLLM from outside: no part of the engine is changed."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import zmq

from tests.e2e.waiting import await_true

# Of pdlaunch's connector and of vLLM's own.
BYTES_READ = ("pdlaunch_kv_transfer_bytes_total", "vllm:nixl_bytes_transferred_sum")
FAILED = ("pdlaunch_kv_transfer_failures_total", "vllm:nixl_num_failed_transfers_total")
EXPIRED = ("pdlaunch_kv_leases_expired_total", "vllm:nixl_num_kv_expired_reqs_total")
GET_META = b"get_meta_msg"
_FIRST_REGIONS = re.compile(r"the first of each group at (.*)")
_REGION = re.compile(r"(0x[0-9a-f]+), (\d+) bytes apart")


def total(metrics: Mapping[str, float], names: Sequence[str]) -> float:
    return sum(metrics.get(name, 0.0) for name in names)


def _metadata(port: int) -> dict[str, Any]:
    """Ask the side channel of an engine with vLLM's connector what it tells its peers."""
    with zmq.Context() as context, context.socket(zmq.REQ) as channel:
        channel.setsockopt(zmq.LINGER, 0)
        channel.setsockopt(zmq.RCVTIMEO, 10_000)
        channel.connect(f"tcp://127.0.0.1:{port}")
        channel.send(msgspec.msgpack.encode((GET_META, 0, 0)))
        payload = msgspec.msgpack.decode(channel.recv_multipart()[0])
    metadata: dict[str, Any] = msgspec.msgpack.decode(payload["agent_metadata_bytes"])
    return metadata


def flip_bit(
    params: dict[str, Any], worker: psutil.Process, log: str, block: int, *, group: int = 0
) -> None:
    """Flip one bit of the ``block``-th block of a KV cache group that ``params`` names.

    ``worker``: the process that holds the KV cache. ``log``: that of its sidecar, in which
    pdlaunch's connector says where its cache lies.
    """
    block_ids = params["remote_block_ids"][group]
    if lines := _FIRST_REGIONS.findall(log):
        address, apart = _REGION.findall(lines[-1])[group]
        start, stride = int(address, 16), int(apart)
    else:
        metadata = _metadata(params["remote_port"])
        start, stride = metadata["kv_caches_base_addr"][0], metadata["block_strides"][0]
    # The sign and most of the exponent of a float32, of the first tokens.
    address = start + block_ids[block] * stride + 67
    with Path(f"/proc/{worker.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(address)
        (value,) = memory.read(1)
        memory.seek(address)
        memory.write(bytes([value ^ 0x40]))


def engine_of(sidecar: psutil.Process) -> psutil.Process:
    """Return the ``vllm serve`` that a sidecar has started."""
    (engine,) = (child for child in sidecar.children() if "serve" in child.cmdline())
    return engine


def worker_of(engine: psutil.Process) -> psutil.Process:
    """Return the process of an engine that computes."""
    return _descendant(engine, "VLLM::Worker")


def core_of(engine: psutil.Process) -> psutil.Process:
    """Return the process of an engine that schedules."""
    return _descendant(engine, "VLLM::EngineCore")


def _descendant(engine: psutil.Process, title: str) -> psutil.Process:
    found: list[psutil.Process] = []

    def is_found() -> bool:  # the kernel's list of children lacks one now and then
        children = engine.children(recursive=True)
        found[:] = [each for each in children if " ".join(each.cmdline()).startswith(title)]
        return len(found) == 1

    await_true(is_found, f"{engine} runs {title}", 60.0)
    return found[0]
