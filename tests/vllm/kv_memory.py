"""Reaches into the KV cache of an engine of vLLM from outside: no part of the engine is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import psutil
import zmq

GET_META = b"get_meta_msg"


def _metadata(port: int) -> dict[str, Any]:
    """Ask the side channel of an engine what it tells its peers."""
    with zmq.Context() as context, context.socket(zmq.REQ) as channel:
        channel.setsockopt(zmq.LINGER, 0)
        channel.setsockopt(zmq.RCVTIMEO, 10_000)
        channel.connect(f"tcp://127.0.0.1:{port}")
        channel.send(msgspec.msgpack.encode((GET_META, 0, 0)))
        payload = msgspec.msgpack.decode(channel.recv_multipart()[0])
    metadata: dict[str, Any] = msgspec.msgpack.decode(payload["agent_metadata_bytes"])
    return metadata


def flip_bit(params: dict[str, Any], worker: psutil.Process, block: int) -> None:
    """Flip one bit of the ``block``-th block that ``params`` names, in the middle of a layer.

    ``worker``: the process that holds the KV cache.
    """
    metadata = _metadata(params["remote_port"])
    (block_ids,) = params["remote_block_ids"]
    layer = len(metadata["kv_caches_base_addr"]) // 2
    address = (
        metadata["kv_caches_base_addr"][layer]
        + block_ids[block] * metadata["block_strides"][layer]
        + metadata["block_lens"][layer] // 2
        + 3  # the sign and most of the exponent of a float32
    )
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
    (found,) = (
        child
        for child in engine.children(recursive=True)
        if " ".join(child.cmdline()).startswith(title)
    )
    return found


def tcp_listeners(process: psutil.Process) -> list[str]:
    """Return the address of each listening socket."""
    return [
        each.laddr.ip
        for each in process.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    ]
