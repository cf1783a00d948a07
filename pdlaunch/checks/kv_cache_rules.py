"""Rules PD208, PD209 and PD214 judge whether the KV cache of a rank holds what it is for."""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.sizes import format_size
from pdlaunch.planning.footprint import Footprint
from pdlaunch.planning.role_engines import RoleEngines

USEFUL_TOKENS = 256
"""A KV cache whose longest request is shorter is a mistake, unless max_model_len says so."""
_MEBIBYTE = 1024**2


@rule(
    "PD208",
    "error",
    fix="Raise kv_cache_memory, or lower max_model_len.",
    source="Number of KV blocks against the longest request.",
    needs=("model",),
    on_vllm=True,
)
def kv_cache_too_small(context: Context) -> Iterator[Found]:
    """The KV cache cannot hold one request of max_model_len; where that is unset, none of 256
    tokens.

    A request that needs more blocks than there are can never run: it is refused although it is
    within max_model_len. A KV cache of a block or two refuses nearly all requests, and a rank whose
    KV cache holds none does not start.
    """
    for engine in context.engines.values():
        if (tokens := _wanted_tokens(engine)) is not None:
            yield from _too_small(engine, tokens)


@rule(
    "PD209",
    "warning",
    fix="Set max_model_len to what fits, or raise kv_cache_memory.",
    source="Number of KV blocks against the longest request.",
    needs=("model",),
    on_vllm=True,
)
def kv_cache_below_model(context: Context) -> Iterator[Found]:
    """The KV cache cannot hold a request as long as the model allows.

    With max_model_len left to the model, longer requests than the KV cache holds are refused one by
    one.
    """
    for engine in context.engines.values():
        # PD208 tells of a length that somebody wants, and of a KV cache that holds next to nothing.
        if engine.settings.max_model_len is None and not _is_too_small(engine):
            yield from _too_small(engine, engine.max_model_len)


@rule(
    "PD214",
    "warning",
    fix="Raise kv_cache_memory, or lower max_num_seqs.",
    source="Number of KV blocks against the largest batch.",
    needs=("model",),
)
def kv_cache_below_batch(context: Context) -> Iterator[Found]:
    """The KV cache has fewer blocks than requests may run.

    Every running request holds a block of each group of layers at least: requests beyond the blocks
    wait, whatever max_num_seqs says, and those that run are preempted as soon as they grow.
    """
    for engine in context.engines.values():
        needed, num_blocks = engine.footprint, engine.num_blocks
        if needed is None or num_blocks is None or _is_too_small(engine):
            continue
        least_blocks, batch = needed.blocks_for(1), engine.settings.max_num_seqs
        if num_blocks < batch * least_blocks:
            most = num_blocks // least_blocks
            message = (
                f"{_count(num_blocks, 'block')} of {format_size(needed.block_bytes)} on each "
                f"{engine.role} rank: room for {_count(most, 'request')}, max_num_seqs is {batch}"
            )
            least = _mebibytes(batch * least_blocks * needed.block_bytes)
            yield Found(
                engine.where("kv_cache_memory"),
                message,
                f"set kv_cache_memory to {least}MiB or more, or max_num_seqs to {most} or less",
            )


def _wanted_tokens(engine: RoleEngines) -> int | None:
    """Return the tokens of a request without which the KV cache is of no use; None: not known."""
    longest = engine.max_model_len
    if longest is None or engine.settings.max_model_len is not None:
        return longest
    return min(USEFUL_TOKENS, longest)


def _is_too_small(engine: RoleEngines) -> bool:
    tokens = _wanted_tokens(engine)
    return tokens is not None and any(_too_small(engine, tokens))


def _too_small(engine: RoleEngines, tokens: int | None) -> Iterator[Found]:
    """Yield what is wrong where the KV cache holds no request of so many tokens."""
    needed, kv_bytes = engine.footprint, engine.kv_cache_bytes
    if needed is None or kv_bytes is None or tokens is None:
        return
    least_bytes = needed.blocks_for(tokens) * needed.block_bytes
    if least_bytes <= kv_bytes:
        return
    message = (
        f"a request of {tokens} tokens needs {_count(needed.blocks_for(tokens), 'block')} x "
        f"{format_size(needed.block_bytes)} = {format_size(least_bytes)} on each {engine.role} "
        f"rank, kv_cache_memory is {format_size(kv_bytes)} "
        f"({_count(kv_bytes // needed.block_bytes, 'block')})"
    )
    yield Found(engine.where("kv_cache_memory"), message, _way_out(needed, kv_bytes, least_bytes))


def _way_out(needed: Footprint, kv_bytes: int, least_bytes: int) -> str:
    fits = needed.longest_request_tokens(kv_bytes)
    shorter = f"set max_model_len to {fits} or less, or " if fits else ""
    longest = (
        f"; the longest request of {needed.max_model_len} tokens needs "
        f"{_mebibytes(needed.min_kv_bytes)}MiB"
        if least_bytes < needed.min_kv_bytes
        else ""
    )
    return f"{shorter}set kv_cache_memory to {_mebibytes(least_bytes)}MiB or more{longest}"


def _mebibytes(num_bytes: int) -> int:
    return -(-num_bytes // _MEBIBYTE)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
