"""Rules PD61x judge engines that are not native: executables, kinds, settings, listeners."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from pdlaunch.checks.context import Context
from pdlaunch.checks.other_engines import vllm_engines, vllm_pair
from pdlaunch.checks.pair_rules import differing_place
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.roles import PAIR
from pdlaunch.config.settings import all_settings
from pdlaunch.config.sizes import format_size
from pdlaunch.machine.engine_commands import EngineCommand
from pdlaunch.planning.step_time import least_step_s
from pdlaunch.planning.vllm_environment import GIBIBYTE

CPU_BLOCK = 32


@rule(
    "PD610",
    "error",
    fix="Set engine once, at the top level.",
    source="KV layouts and handshakes of both kinds.",
)
def kinds_differ(context: Context) -> Iterator[Found]:
    """Prefill and decode engines are of different kinds.

    A native engine cannot read the KV blocks of vLLM, nor the other way round.
    """
    if (pair := context.pair()) is None:
        return
    prefill, decode = (side.settings.engine for side in pair)
    if prefill != decode:
        message = f"prefill engines are {prefill}, decode engines {decode}"
        yield Found(differing_place(*pair, "engine"), message)


@rule(
    "PD611",
    "error",
    fix=(
        "Install vLLM, or set engine_command to its executable: a name on PATH, or a path. Start "
        "agents of other hosts with --allow-executable."
    ),
    source="execve(2); vllm serve --help=all, which --probe runs.",
    needs=("engine_commands",),
)
def command_not_there(context: Context) -> Iterator[Found]:
    """The executable of an engine cannot be run.

    On another host its agent has to allow it. vLLM may have an environment of its own: pdlaunch
    starts it, and imports nothing of it.
    """
    for engines in vllm_engines(context):
        command, role = engines.settings.engine_command, engines.role
        problems = [
            f"{context.on_host(host)}{command}: {found.problem}"
            for host, found in context.engine_commands(role).items()
            if found.problem
        ]
        asked = (context.probes.engine_flags or {}).get(role)
        if not problems and asked is not None and asked.problem:
            problems = [f"{command}: `serve --help=all` ended without flags: {asked.problem}"]
        for problem in problems:
            yield Found(engines.where("engine_command"), problem)


@rule(
    "PD612",
    "error",
    fix="Use the same vLLM on both sides: set engine_command once, at the top level.",
    source="vLLM's NIXL handshake refuses another version (compute_nixl_compatibility_hash).",
    needs=("engine_commands",),
)
def versions_differ(context: Context) -> Iterator[Found]:
    """Prefill and decode are different versions of vLLM.

    Both become healthy; the handshake of the first request fails, and decode computes every prompt
    itself.
    """
    if (pair := vllm_pair(context)) is None:
        return
    found = {side.role: context.engine_commands(side.role) for side in pair}
    versions = [_versions(found[side.role]) for side in pair]
    if all(versions) and len({*versions[0], *versions[1]}) > 1:
        yield Found(
            differing_place(*pair, "engine_command"),
            f"prefill is vLLM {' and '.join(versions[0])}, decode vLLM {' and '.join(versions[1])}",
        )


@rule(
    "PD613",
    "error",
    fix=f"Use a multiple of {CPU_BLOCK}, or leave block_size out.",
    source="get_supported_kernel_block_sizes of vLLM 0.32's attention on CPUs.",
)
def block_size_on_cpu(context: Context) -> Iterator[Found]:
    """block_size is not what vLLM's attention on a CPU takes.

    Its kernels have blocks of 32 tokens, and an engine with others ends at its start.
    """
    for engines in vllm_engines(context):
        size = engines.block_size
        if engines.device == "cpu" and size is not None and size % CPU_BLOCK:
            rounded = (size // CPU_BLOCK + 1) * CPU_BLOCK
            yield Found(
                engines.where("block_size"),
                f"block_size is {size}, no multiple of {CPU_BLOCK}",
                f"set it to {rounded}",
            )


@rule(
    "PD614",
    "error",
    fix="Set kv_transfer.connector to nixl.",
    source="The kv-transfer configuration that pdlaunch gives vLLM.",
)
def connector_not_nixl(context: Context) -> Iterator[Found]:
    """Engines of vLLM are to move KV blocks by another connector than NIXL.

    pdlaunch starts, proves and measures pairs of vLLM with its NixlConnector alone.
    """
    connector = context.config.kv_transfer.connector
    if vllm_pair(context) and connector != "nixl":
        yield Found("kv_transfer.connector", f"connector {connector} with engines of vLLM")


@rule(
    "PD615",
    "warning",
    fix="Remove it.",
    source="The command and environment that pdlaunch gives vLLM.",
)
def native_setting(context: Context) -> Iterator[Found]:
    """A setting has no effect on engines of this kind.

    A setting that is ignored gives a wrong idea of what runs.
    """
    native_alone = [name for name, setting in all_settings().items() if setting.is_native_alone]
    for engines in vllm_engines(context):
        for name in native_alone:
            for path in dict.fromkeys((name, f"{engines.role}.{name}")):
                if context.given(path):
                    yield Found(path, f"{name} does nothing for engines of vLLM")
        size = engines.settings.kv_cache_memory
        if engines.device == "cpu" and size is not None and size % GIBIBYTE:
            yield Found(
                engines.where("kv_cache_memory"),
                f"kv_cache_memory {format_size(size)} comes to "
                f"{format_size(engines.kv_cache_bytes or 0)}: vLLM counts in GiB on a CPU",
                "set it to whole GiB",
            )
    for engines in context.engines.values():
        if engines.is_native:
            for name in ("engine_args", "engine_command"):
                for where in _given(context, engines.role, name):
                    yield Found(where, f"{name} does nothing for native engines")


@rule(
    "PD616",
    "warning",
    fix=(
        "Use a vLLM whose KV pdlaunch verifies (PD629), with kv_transfer.verify: on: its connector "
        "has UCX listen nowhere. Or use engine: native. In a network namespace of its own a "
        "deployment is safe, though the warning stays."
    ),
    source="Listening sockets of vLLM 0.32 with NIXL 1.5.1 (ss -ltnp).",
)
def open_listeners(context: Context) -> Iterator[Found]:
    """vLLM's stock NixlConnector listens without authentication.

    UCX listens on TCP, on addresses that other hosts can reach, and takes READs and WRITEs of KV
    blocks from whoever can connect; it cannot be told otherwise. gloo and the side channel
    listen on the loopback device. What engines open to peers on other hosts is PD428's subject.
    """
    is_near = any(
        engine.engines.role in PAIR and not engine.engines.has_far_peers
        for engine in context.launch.engines
    )
    if (pair := vllm_pair(context)) and pair[0].unverified and is_near:
        yield Found("engine", "UCX in each engine of vLLM listens on TCP for everybody")


@rule(
    "PD617",
    "warning",
    fix="Set kv_transfer.on_failure to recompute.",
    source="kv_load_failure_policy of vLLM.",
)
def failure_ends_requests(context: Context) -> Iterator[Found]:
    """A failed transfer ends the request.

    vLLM answers with an error where decode could have computed the prompt itself.
    """
    if vllm_pair(context) and context.config.kv_transfer.on_failure == "fail":
        yield Found("kv_transfer.on_failure", "decode engines of vLLM give up when a pull fails")


@rule(
    "PD618",
    "warning",
    fix="Set prefill.port and decode.port to 0, or switch enable_sleep_mode off.",
    source="register_vllm_dev_api_routers of vLLM 0.32; its key guards /v1, /v2 and /inference.",
)
def dev_routes_on_a_port(context: Context) -> Iterator[Found]:
    """Routes that run methods in an engine are open at its port.

    Sleep mode needs vLLM's dev mode, which also adds /collective_rpc, without any key. At a socket
    of the launch the user of the launch alone can open them.
    """
    # On several hosts the port is that of a sidecar, which asks for the launch's token.
    for engines in vllm_engines(context) if not context.launch.spans_hosts else ():
        if engines.settings.enable_sleep_mode and engines.ports:
            yield Found(f"{engines.role}.port", "enable_sleep_mode opens /collective_rpc there")


@rule(
    "PD619",
    "error",
    fix="Make kv_transfer.lease_s longer (30 is vLLM's own), or lower max_num_batched_tokens.",
    source=(
        "vLLM 0.32 (_heartbeat_interval, _lease_extension): from when a request is in its queue, "
        "decode renews the lease every lease // 6 s, each time for lease * 2 // 3 s, between two "
        "steps."
    ),
)
def lease_shorter_than_queue(context: Context) -> Iterator[Found]:
    """A lease ends while its request waits in the queue of decode.

    vLLM's prefill then gives the blocks to others, the late read succeeds, and decode answers with
    the text of another prompt (HTTP 200). The queue may be long, as decode renews the lease; but
    the time between two renewals and a step of decode must fit into what one adds. vLLM counts all
    of these in whole seconds, and the time of a step here is the least that it can take.
    """
    pair = vllm_pair(context)
    if pair is None:
        return
    lease_s = int(context.config.kv_transfer.lease_s)
    left_s = renewed_for_s(lease_s)
    step_s = least_step_s(pair[1]) or 0.0
    if left_s <= 0:
        yield Found(
            "kv_transfer.lease_s",
            f"lease_s is {lease_s} to vLLM, too short to be renewed while a request waits",
            "set lease_s to 2 or more",
        )
    elif left_s <= step_s:
        enough_s = next(each for each in itertools.count(lease_s) if renewed_for_s(each) > step_s)
        yield Found(
            "kv_transfer.lease_s",
            f"lease_s is {lease_s}, and a step of decode takes at least {step_s:.2g} s",
            f"set lease_s to {enough_s} or more, or lower max_num_batched_tokens",
        )


def renewed_for_s(lease_s: int) -> int:
    """Return what is left of a renewed lease of vLLM when its next renewal is due."""
    return lease_s * 2 // 3 - lease_s // 6


def _versions(found: Mapping[str, EngineCommand]) -> list[str]:
    return sorted({each.version for each in found.values() if each.version is not None})


def _given(context: Context, role: str, name: str) -> list[str]:
    return [
        path
        for path in context.origins
        for start in (name, f"{role}.{name}")
        if (path == start or path.startswith(f"{start}.")) and context.given(path)
    ]
