"""Asks the side channel of an engine of vLLM what it tells every decode engine.

vLLM's listener ends at a question for a rank that does not exist: those ranks alone are asked that
the engine has named itself, in the ``kv_transfer_params`` of an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import zmq
import zmq.asyncio

from pdlaunch.errors import ProtocolError


class SideChannel(NamedTuple):
    """Says where decode engines are told to ask an engine, and of which ranks."""

    engine_id: str
    host: str
    port: int
    tp_size: int
    pp_size: int


class ToldHandshake(NamedTuple):
    """Holds what all ranks of an engine tell; ``num_blocks`` is that of the first."""

    num_ranks: int
    layout: str
    attention: str
    block_size: int
    num_blocks: int


def side_channel_of(params: Mapping[str, Any]) -> SideChannel | None:
    """Return the side channel that ``kv_transfer_params`` name; None: they name none of vLLM's."""
    match params:
        case {
            "remote_engine_id": str(engine_id),
            "remote_host": str(host),
            "remote_port": int(port),
            "tp_size": int(tp_size),
        }:
            return SideChannel(engine_id, host, port, tp_size, int(params.get("pp_size") or 1))
        case _:
            return None


async def shake_hands(channel: SideChannel, timeout_s: float) -> ToldHandshake:
    """Ask every rank. Raises ProtocolError."""
    host = channel.host
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    context = zmq.asyncio.Context()
    try:
        async with asyncio.timeout(timeout_s):
            told = [
                await _ask(context, f"tcp://{host}:{channel.port}", pp_rank, tp_rank)
                for pp_rank in range(channel.pp_size)
                for tp_rank in range(channel.tp_size)
            ]
        for metadata in told:
            if metadata["engine_id"] != channel.engine_id:
                raise ProtocolError(f"another engine answers there, {metadata['engine_id']}")
        first = told[0]
        return ToldHandshake(
            len(told),
            str(first["kv_cache_layout"]),
            str(first["attn_backend_name"]),
            int(first["block_size"]),
            int(first["num_blocks"]),
        )
    except TimeoutError:
        raise ProtocolError(f"it says nothing within {timeout_s:g} s") from None
    except (msgspec.DecodeError, zmq.ZMQError, LookupError, TypeError, ValueError) as error:
        raise ProtocolError(f"not a side channel of vLLM: {error!r}") from error
    finally:
        context.destroy(linger=0)


async def _ask(
    context: zmq.asyncio.Context, address: str, pp_rank: int, tp_rank: int
) -> dict[str, Any]:
    with context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        await socket.send(msgspec.msgpack.encode((b"get_meta_msg", pp_rank, tp_rank)))
        payload = msgspec.msgpack.decode((await socket.recv_multipart())[0])
    return msgspec.msgpack.decode(payload["agent_metadata_bytes"], type=dict[str, Any])
