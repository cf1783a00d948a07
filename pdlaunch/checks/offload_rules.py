"""Rules PD22x judge the host tier of the KV cache."""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.sizes import format_size
from pdlaunch.machine.facts import UNLIMITED
from pdlaunch.planning.role_engines import RoleEngines

SETTING = "kv_offload.host_memory"


@rule(
    "PD220",
    "error",
    fix="Switch enable_prefix_caching on, or remove kv_offload.",
    source="The host tier is content-addressed by the hashes of the prefix cache.",
)
def tier_without_prefix_cache(context: Context) -> Iterator[Found]:
    """The host tier is of no use without the prefix cache.

    Blocks are kept and found under the hashes that prefix caching computes; without them no block
    would ever come back.
    """
    for engine in _with_tier(context):
        if not engine.settings.enable_prefix_caching:
            message = f"{SETTING} is {_size(engine)}, but enable_prefix_caching is false"
            yield Found(engine.where("enable_prefix_caching"), message)


@rule(
    "PD221",
    "error",
    fix="Lower kv_offload.host_memory; it is the share of one rank.",
    source="The machine's memory (its control group included).",
    needs=("memory",),
)
def tiers_exceed_memory(context: Context) -> Iterator[Found]:
    """The host tiers need more memory than the machine has.

    Every rank takes kv_offload.host_memory at its start, page-locked beside a GPU; engines on the
    CPU need their own memory too.
    """
    tiers = {engine: engine.num_ranks * engine.host_tier_bytes for engine in _with_tier(context)}
    others = sum(
        engine.num_ranks * engine.footprint.total_bytes
        for engine in context.on("cpu")
        if engine.footprint is not None
    )
    total = sum(tiers.values()) + others
    if tiers and total > context.machine.memory_bytes:
        parts = " + ".join(
            f"{engine.num_ranks} {engine.role} ranks x {_size(engine)}" for engine in tiers
        )
        rest = f" + {format_size(others)} for engines on the CPU" if others else ""
        message = (
            f"{parts}{rest} = {format_size(total)} of {format_size(context.machine.memory_bytes)}"
        )
        yield Found(next(iter(tiers)).where(SETTING), message)


@rule(
    "PD222",
    "warning",
    fix=(
        "Raise the limit (ulimit -l unlimited; --ulimit memlock=-1 for a container), or lower "
        "kv_offload.host_memory."
    ),
    source=(
        "setrlimit(2), RLIMIT_MEMLOCK; CUDA drivers differ in whether they count what they "
        "register."
    ),
    needs=("limits",),
)
def tier_over_locked_memory(context: Context) -> Iterator[Found]:
    """The host tier of a rank beside a GPU is larger than the limit of locked memory.

    Its memory is page-locked, so that copies run at the speed of PCIe. Where the limit is enforced,
    the rank ends at its start.
    """
    limit = context.machine.limits.memlock_bytes
    for engine in _with_tier(context):
        if engine.device == "cuda" and limit != UNLIMITED and engine.host_tier_bytes > limit:
            yield Found(
                engine.where(SETTING),
                f"{_size(engine)} is over RLIMIT_MEMLOCK, {format_size(limit)}",
            )


@rule(
    "PD223",
    "warning",
    fix="Give the host tier several times the size of the KV cache, or remove kv_offload.",
    source=(
        "Blocks are copied to the host as soon as they are full, so the tier holds what the device "
        "holds, and more if it can."
    ),
)
def tier_smaller_than_cache(context: Context) -> Iterator[Found]:
    """The host tier is not larger than the KV cache of the device.

    It then holds little that the device does not hold itself.
    """
    for engine in _with_tier(context):
        if engine.kv_cache_bytes is not None and engine.host_tier_bytes <= engine.kv_cache_bytes:
            message = (
                f"{SETTING} {_size(engine)} is not over the KV cache of a rank, "
                f"{format_size(engine.kv_cache_bytes)}"
            )
            yield Found(engine.where(SETTING), message)


@rule(
    "PD224",
    "error",
    fix="Raise kv_offload.host_memory, or choose a smaller block_size.",
    source="The model's config.json.",
    needs=("model",),
)
def tier_holds_no_block(context: Context) -> Iterator[Found]:
    """The host tier has no room for a single chunk of KV blocks.

    The rank would refuse to start. Beside a GPU several small blocks share a chunk.
    """
    for engine in _with_tier(context):
        needed = engine.footprint
        if needed is not None and engine.host_tier_bytes < needed.host_chunk_bytes:
            message = (
                f"{SETTING} {_size(engine)} holds no chunk of "
                f"{needed.blocks_per_chunk} blocks, {format_size(needed.host_chunk_bytes)}"
            )
            yield Found(engine.where(SETTING), message)


@rule(
    "PD225",
    "info",
    fix="Set kv_offload.host_memory, or remove kv_offload.policy.",
    source="kv_offload.",
)
def policy_without_tier(context: Context) -> Iterator[Found]:
    """A policy is given for a host tier that does not exist.

    Nothing is kept in host memory unless kv_offload.host_memory says how much.
    """
    of_tiers = {engine.where("kv_offload.policy") for engine in _with_tier(context)}
    for engine in context.engines.values():
        where = engine.where("kv_offload.policy")
        if context.given(where) and where not in of_tiers:
            yield Found(where, f"{SETTING} is 0: there is nothing to evict")


def _with_tier(context: Context) -> Iterator[RoleEngines]:
    return (engine for engine in context.engines.values() if engine.host_tier_bytes)


def _size(engine: RoleEngines) -> str:
    return format_size(engine.host_tier_bytes)
