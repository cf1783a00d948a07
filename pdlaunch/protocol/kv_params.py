"""Reads and writes ``kv_transfer_params``: vLLM's wire form, plus one key of ours.

A prefill engine answers with them, and a decode engine is given them. The routers of vLLM pass them
on unread; ours reads and completes the ``pdlaunch`` key. Source: vLLM 0.24 to 0.32, NIXL connector.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec

from pdlaunch.errors import RequestError
from pdlaunch.protocol.ids import EngineId, LeaseId

MAX_LISTED_BLOCKS = 1_000_000

T = TypeVar("T")

# Bounded, as larger ones cannot be sent on.
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_IS_ID = msgspec.Meta(min_length=1, max_length=256)
_WIRE_NAMES = {
    "engine_id": "remote_engine_id",
    "lease_id": "remote_request_id",
    "host": "remote_host",
    "port": "remote_port",
    "block_ids": "remote_block_ids",
    "num_tokens": "remote_num_tokens",
    "lease_s": "remote_lease_s",
}


class RemoteKV(msgspec.Struct, frozen=True, kw_only=True, rename=_WIRE_NAMES):
    """Locates blocks under lease at a prefill engine."""

    engine_id: Annotated[EngineId, _IS_ID]
    lease_id: Annotated[LeaseId, _IS_ID]
    host: Annotated[str, _IS_ID]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    block_ids: list[list[_Count]]
    """One list for each KV cache group. Informative: decode uses what ``pull_begin`` says."""
    num_tokens: _Count
    tp_size: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1
    lease_s: float = 0.0


class FirstToken(msgspec.Struct, frozen=True, kw_only=True):
    """Holds the first output token of one choice, sampled by the prefill engine."""

    token_id: _Count
    finish_reason: str | None = None
    """``stop`` when the choice ended with this token; then it needs no decode."""
    logprob: float | None = None
    top_logprobs: list[tuple[_Count, float]] = []


class PdlaunchParams(msgspec.Struct, frozen=True, kw_only=True):
    """Holds our key ``pdlaunch`` inside kv_transfer_params."""

    first_tokens: list[FirstToken] = []  # one for each choice; filled by prefill
    first_token_sent: bool = False
    """Set by a router that has streamed to the client what the prefill engine's answer holds."""


def to_wire(remote: RemoteKV, pdlaunch: PdlaunchParams | None) -> dict[str, Any]:
    """Return the ``kv_transfer_params`` of a prefill engine's answer."""
    params: dict[str, Any] = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        **msgspec.to_builtins(remote),
        "dcp_size": 1,
        "pp_size": 1,
        "transfer_mode": "pull",
        "remote_blocks_expiry_time": None,
    }
    return params if pdlaunch is None else params | {"pdlaunch": msgspec.to_builtins(pdlaunch)}


class KVTransferParams(msgspec.Struct, frozen=True, kw_only=True):
    """Says what an engine was asked to do with KV blocks."""

    do_remote_decode: bool = False
    remote_kv: RemoteKV | None = None
    pdlaunch: PdlaunchParams | None = None


def from_wire(params: object) -> KVTransferParams:
    """Read the ``kv_transfer_params`` of a request to an engine.

    Keys that other versions of vLLM add are ignored; those used here are checked. Raises
    RequestError naming the key.
    """
    if not isinstance(params, dict):
        raise RequestError("kv_transfer_params must be an object", param="kv_transfer_params")
    known = {key: value for key, value in params.items() if value is not None}
    for key in ("do_remote_decode", "do_remote_prefill"):
        if not isinstance(known.get(key, False), bool):
            message = f"{key} must be true, false or null"
            raise RequestError(message, param=f"kv_transfer_params.{key}")
    decode, prefill = known.get("do_remote_decode", False), known.get("do_remote_prefill", False)
    if decode and prefill:
        raise RequestError(
            "do_remote_decode and do_remote_prefill exclude each other",
            param="kv_transfer_params.do_remote_decode",
        )
    pdlaunch = known.get("pdlaunch")
    return KVTransferParams(
        do_remote_decode=decode,
        remote_kv=_read_remote(known) if prefill else None,
        pdlaunch=None
        if pdlaunch is None
        else _convert(pdlaunch, PdlaunchParams, "kv_transfer_params.pdlaunch"),
    )


def _read_remote(params: dict[str, Any]) -> RemoteKV:
    for name, key in _WIRE_NAMES.items():
        if key not in params and name != "lease_s":
            raise RequestError(f"{key} is missing", param=f"kv_transfer_params.{key}")
    remote = _convert(params, RemoteKV, "kv_transfer_params")
    if sum(map(len, remote.block_ids)) > MAX_LISTED_BLOCKS:
        raise RequestError(
            f"more than {MAX_LISTED_BLOCKS} block ids", param="kv_transfer_params.remote_block_ids"
        )
    return remote


def _convert(value: object, kind: type[T], param: str) -> T:
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise RequestError(f"{param}: {error}", param=param) from None
