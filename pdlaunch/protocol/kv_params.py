"""Reads and writes ``kv_transfer_params``: the fields of vLLM, plus the key ``pdlaunch``.

A prefill engine returns them, and the router sends them to a decode engine. Routers of vLLM do not
read them; ours reads and completes the ``pdlaunch`` key. Source: vLLM 0.24 to 0.32, NIXL connector.
"""

import re
from typing import Annotated, Any, TypeVar

import msgspec

from pdlaunch.errors import RequestError
from pdlaunch.protocol.ids import EngineId, LeaseId

MAX_LISTED_BLOCKS = 1_000_000

T = TypeVar("T")

# Bounded, because larger numbers cannot be encoded for the engine.
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_IS_ID = msgspec.Meta(min_length=1, max_length=256)
# The path of the field in an error message of msgspec.
_PLACE = re.compile(r" - at `\$(.*)`$")
_MISSING = re.compile(r"missing required field `(.*?)`")


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One output token, for a server, or for an engine that continues after this token."""

    token_id: _Count
    # Natural log of the probability before temperature and truncation (vLLM's `raw_logprobs`).
    logprob: float | None = None
    top_logprobs: tuple[tuple[_Count, float], ...] = ()  # (token id, logprob), best first
    # Set if the choice ended with this token, so that it needs no decoding.
    finish_reason: str | None = None


_VLLM_NAMES = {"lease_id": "remote_request_id", "tp_size": "tp_size"}


class RemoteKV(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    rename=lambda name: _VLLM_NAMES.get(name, f"remote_{name}"),
):
    engine_id: Annotated[EngineId, _IS_ID]
    lease_id: Annotated[LeaseId, _IS_ID]
    host: Annotated[str, _IS_ID]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    # One list for each KV cache group. Informative: decode uses the blocks of the PullReply.
    block_ids: list[list[_Count]]
    num_tokens: _Count
    tp_size: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1
    lease_s: float = 0.0


class PdlaunchParams(msgspec.Struct, frozen=True, kw_only=True):
    first_tokens: list[TokenOutput] = []  # one for each choice; set by the prefill engine
    # Set by a router that has already streamed the prefill engine's tokens to the client.
    first_token_sent: bool = False


class KVTransferParams(msgspec.Struct, frozen=True, kw_only=True):
    do_remote_decode: bool = False
    remote_kv: RemoteKV | None = None
    pdlaunch: PdlaunchParams = PdlaunchParams()


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


def from_wire(params: object) -> KVTransferParams:
    """Read ``kv_transfer_params``, without unknown keys, since other versions of vLLM may add some.
    Raises RequestError that names the key.
    """
    place = "kv_transfer_params"
    if not isinstance(params, dict):
        raise RequestError(f"{place} must be an object", param=place)
    known = {key: value for key, value in params.items() if value is not None}
    decode, prefill = (
        _convert(known.get(key, False), bool, f"{place}.{key}")
        for key in ("do_remote_decode", "do_remote_prefill")
    )
    if decode and prefill:
        raise RequestError(
            "do_remote_decode and do_remote_prefill exclude each other",
            param=f"{place}.do_remote_decode",
        )
    remote = _convert(known, RemoteKV, place) if prefill else None
    if remote is not None and sum(map(len, remote.block_ids)) > MAX_LISTED_BLOCKS:
        raise RequestError(
            f"more than {MAX_LISTED_BLOCKS} block ids", param=f"{place}.remote_block_ids"
        )
    pdlaunch = _convert(known.get("pdlaunch", {}), PdlaunchParams, f"{place}.pdlaunch")
    return KVTransferParams(do_remote_decode=decode, remote_kv=remote, pdlaunch=pdlaunch)


def _convert(value: object, kind: type[T], place: str) -> T:
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        path = place + "".join(_PLACE.findall(str(error)))
        path += "".join(f".{name}" for name in _MISSING.findall(str(error)))
        raise RequestError(f"{path}: {_PLACE.sub('', str(error))}", param=path) from None
