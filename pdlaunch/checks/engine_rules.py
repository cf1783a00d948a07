"""Rules PD60x to PD63x judge engines of vLLM: flags, executables, settings, pairs, variables.

vLLM compares most of what makes a pair in the handshake of the first request, when both engines are
healthy; where that fails, decode computes the prompt itself, without a word to the client.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from pdlaunch.checks.context import Context, pair, vllm_engines, vllm_pair
from pdlaunch.checks.memory_rules import segments_variable
from pdlaunch.checks.rule import Found, differing_place, error, warning
from pdlaunch.config.http_names import is_loopback
from pdlaunch.config.problems import shown_name
from pdlaunch.config.roles import PAIR
from pdlaunch.config.settings import all_settings
from pdlaunch.config.vllm_arguments import (
    DOORS,
    FOREIGN_CODE,
    KV_EVENTS,
    OURS,
    REFUSED,
    long_name,
    values_like_flags,
    vllm_flag_name,
)
from pdlaunch.planning.role_engines import RoleEngines
from pdlaunch.planning.vllm_engines import AWAITS_AGENT
from pdlaunch.vllm.support import SUPPORTED_VERSIONS

_PARSER = "The parser of vllm serve 0.32."
_HANDSHAKE = "vLLM 0.32: compute_nixl_compatibility_hash, _validate_remote_agent_handshake."
_ENVS = "vllm/envs.py of vLLM 0.32."
_REMOVE = "Remove it from engine_args."
_OF_BLOCKS = (
    "attention-backend attention-config decode-context-parallel-size default-mm-loras "
    "disable-hybrid-kv-cache-manager disable-sliding-window enable-lora hf-overrides "
    "kv-cache-dtype kv-cache-dtype-skip-layers kv-sharing-fast-prefill lora-dtype lora-modules "
    "lora-target-modules mamba-block-size mamba-cache-dtype mamba-ssm-cache-dtype max-lora-rank "
    "model-impl quantization quantization-config spec-method spec-model spec-tokens "
    "speculative-config"
)
"""Flags of vLLM that shape KV blocks, or decide which blocks a request has."""
_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
_EVERYWHERE = ("", "*", "0.0.0.0", "::")
_OPEN: Mapping[str, str] = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "lets messages between processes hold code (pickle)",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "lets clients load adapters from any folder",
    "VLLM_PLUGINS": "runs code of these packages in the engine",
}
_Pair = tuple[RoleEngines, RoleEngines]


@dataclass(frozen=True, slots=True)
class EngineArgument:
    """Holds one entry of ``engine_args``."""

    key: str  # the name as it was written
    value: JsonValue
    where: str  # the setting that gives it

    @property
    def name(self) -> str:
        return long_name(self.key)

    @property
    def is_off(self) -> bool:
        return self.value is vllm_flag_name(self.key).startswith("no-")

    @property
    def json(self) -> JsonValue:
        """Return its value, read where it is the text of a JSON object."""
        if isinstance(self.value, str) and self.value.startswith("{"):
            try:
                found: JsonValue = json.loads(self.value)
            except ValueError:
                return self.value
            return found
        return self.value


def _arguments(context: Context, each: RoleEngines) -> Iterator[EngineArgument]:
    """Return what ``engine_args`` gives engines, the role's own entries over the top level."""
    for key, value in each.settings.engine_args.items():
        paths = (f"{each.role}.engine_args.{key}", f"engine_args.{key}")
        where = next((path for path in paths if context.given(path)), paths[1])
        yield EngineArgument(key, value, where)


def _all_arguments(context: Context) -> Iterator[EngineArgument]:
    for each in vllm_engines(context):
        yield from _arguments(context, each)


def _in_table(
    table: Mapping[str, str], colon: str = ""
) -> Callable[[EngineArgument], Found | None]:
    """Find the arguments in a table, with its text; what is switched off opens nothing."""

    def find(argument: EngineArgument) -> Found | None:
        if argument.name not in table or argument.is_off:
            return None
        return Found(f"--{argument.name}{colon} {table[argument.name]}", argument.where)

    return find


def _ours(argument: EngineArgument) -> Found | None:
    if argument.name not in OURS:
        return None
    message = f"pdlaunch sets --{argument.name} itself"
    return Found(message, argument.where, OURS[argument.name])


def _open_endpoints(argument: EngineArgument) -> Iterator[Found]:
    config = argument.json
    if argument.name != KV_EVENTS:
        return
    if not isinstance(config, dict) or "." in argument.key:
        fix = "write it as a mapping: enable_kv_cache_events: true"
        yield Found(f"--{KV_EVENTS} cannot be checked in this form", argument.where, fix)
        return
    for name in ("endpoint", "replay_endpoint"):
        endpoint = config.get(name)
        if endpoint is not None and not str(endpoint).startswith(("ipc://", "inproc://")):
            message = f"{name} of KV events is {endpoint}, open to other users"
            yield Found(message, argument.where)


def _ambiguous(context: Context) -> Iterator[Found]:
    for each in vllm_engines(context):
        given = list(_arguments(context, each))
        for it in given:
            if any(values_like_flags(it.value)):
                yield Found(f"vLLM would take the value of {it.key} for flags", it.where)
        # argparse keeps the last of two spellings without a word.
        for name, count in Counter(vllm_flag_name(it.key) for it in given).items():
            if count > 1:
                keys = [it for it in given if vllm_flag_name(it.key) == name]
                spelt = " and ".join(it.key for it in keys)
                yield Found(f"--{name} is given {count} times, as {spelt}", keys[-1].where)


def _no_command(context: Context) -> Iterator[Found]:
    for each in vllm_engines(context):
        command = each.settings.engine_command
        problems = [
            f"{f'on {host}: ' if context.launch.spans_hosts else ''}{command}: {found.problem}"
            for host, found in context.engine_commands(each.role).items()
            if found.problem
        ]
        yield from (Found(problem, each.where("engine_command")) for problem in problems)


def _versions_differ(context: Context) -> Iterator[Found]:
    for sides in vllm_pair(context):
        commands = [context.engine_commands(side.role).values() for side in sides]
        versions = [sorted({it.version for it in found if it.version}) for found in commands]
        if all(versions) and len({*versions[0], *versions[1]}) > 1:
            prefill, decode = (" and ".join(each) for each in versions)
            place = differing_place(*sides, "engine_command")
            yield Found(f"prefill is vLLM {prefill}, decode vLLM {decode}", place)


def _ignored_settings(context: Context) -> Iterator[Found]:
    native_alone = [name for name, setting in all_settings().items() if setting.is_native_alone]
    for each in vllm_engines(context):
        for name in native_alone:
            for path in filter(context.given, dict.fromkeys((name, f"{each.role}.{name}"))):
                yield Found(f"{name} does nothing for engines of vLLM", path)
    for each in context.engines.values():
        for name in ("engine_args", "engine_command") if each.is_native else ():
            for path in filter(context.given, context.origins):
                starts = (name, f"{each.role}.{name}")
                if path in starts or path.startswith(tuple(f"{start}." for start in starts)):
                    yield Found(f"{name} does nothing for native engines", path)


def _stock_listeners(context: Context) -> bool:
    is_near = any(
        engine.engines.role in PAIR and not engine.engines.has_far_peers
        for engine in context.launch.engines
    )
    return is_near and any(sides[0].unverified for sides in vllm_pair(context))


def _dev_ports(context: Context) -> Iterator[Found]:
    # On several hosts the port is that of a sidecar, which asks for the launch's token.
    for each in vllm_engines(context) if not context.launch.spans_hosts else ():
        if each.settings.enable_sleep_mode and each.ports:
            yield Found("enable_sleep_mode opens /collective_rpc there", f"{each.role}.port")


def _short_lease(context: Context) -> Iterator[Found]:
    for _, decode in vllm_pair(context):
        # vLLM takes whole seconds; its arithmetic below is in integers, too.
        lease_s = int(context.kv_transfer.lease_s)
        step_s = decode.least_step_s or 0.0
        if renewed_for_s(lease_s) <= 0:
            yield Found(
                f"lease_s is {lease_s} to vLLM, too short to be renewed while a request waits",
                fix="set lease_s to 2 or more",
            )
        elif renewed_for_s(lease_s) <= step_s:
            enough_s = next(it for it in itertools.count(lease_s) if renewed_for_s(it) > step_s)
            yield Found(
                f"lease_s is {lease_s}, and a step of decode takes at least {step_s:.2g} s",
                fix=f"set lease_s to {enough_s} or more, or lower max_num_batched_tokens",
            )


def renewed_for_s(lease_s: int) -> int:
    """Return what is left of a renewed lease of vLLM when its next renewal is due."""
    return lease_s * 2 // 3 - lease_s // 6


def _models_of(sides: _Pair) -> Found | None:
    prefill, decode = (side.model.path or side.settings.model for side in sides)
    return Found(f"prefill loads {prefill}, decode {decode}") if prefill != decode else None


def _block_sizes(sides: _Pair) -> Found | None:
    prefill, decode = (side.block_size for side in sides)
    on_gpus = all(side.device == "cuda" for side in sides)
    if prefill == decode or (on_gpus and prefill and decode and decode % prefill == 0):
        return None
    sizes = [str(size or "what vLLM chooses") for size in (prefill, decode)]
    return Found(f"block_size of prefill is {sizes[0]}, of decode {sizes[1]}")


def _tp_sizes(sides: _Pair) -> Found | None:
    prefill, decode = (side.tp_size for side in sides)
    sizes = f"prefill has {prefill} ranks an engine, decode {decode}"
    heads = sides[0].shape.num_kv_heads if sides[0].shape is not None else None
    if prefill % decode and decode % prefill:
        return Found(sizes)
    if prefill > decode and heads is not None and prefill > heads:
        place = sides[0].where("tensor_parallel_size")
        return Found(f"{sizes}, and the model has {heads} KV heads", place)
    return None


def _differing_flags(context: Context) -> Iterator[Found]:
    for sides in vllm_pair(context):
        flags = [_flags_of(context, side) for side in sides]
        for key in dict.fromkeys((*flags[0], *flags[1])):
            values = [str(side[key][0]) if key in side else "not given" for side in flags]
            if values[0] != values[1]:
                _, place = flags[1].get(key) or flags[0][key]
                message = f"--{key} of prefill is {values[0]}, of decode {values[1]}"
                yield Found(message, place)


def _flags_of(context: Context, each: RoleEngines) -> dict[str, tuple[JsonValue, str]]:
    """Return values and places of flags that shape KV blocks, by long name and, of single keys of a
    JSON value, path.
    """
    return {
        f"{it.name}.{it.key.partition('.')[2]}".rstrip("."): (
            False if it.is_off else it.json,
            it.where,
        )
        for it in _arguments(context, each)
        if it.name in _OF_BLOCKS.split()
    }


def _slow_cumem(context: Context) -> Iterator[Found]:
    for each in itertools.chain(*vllm_pair(context)):
        if each.device == "cuda" and any(gpu.has_fabric_handles is False for gpu in each.gpus):
            for name in ("enable_sleep_mode", "enable_cumem_allocator"):
                if getattr(each.settings, name):
                    message = f"{name} moves the KV cache into CuMem pools"
                    yield Found(message, each.where(name))


def _segments(each: RoleEngines) -> Found | None:
    name = segments_variable(each)
    return Found(f"{name} switches expandable_segments on", f"${name}") if name else None


def _not_proven(context: Context) -> Iterator[str]:
    for prefill, _ in vllm_pair(context) if context.kv_transfer.verify else ():
        reason = prefill.unverified
        if reason and not reason.endswith(AWAITS_AGENT):
            yield f"wrong KV blocks would be used unnoticed: {reason}"


def _side_channels(context: Context) -> Iterator[tuple[RoleEngines, str]]:
    for here in context.launch.placed.by_host.values():
        for each in here.values():
            if each.settings.engine == "vllm":
                yield each, each.environment.get(_HOST, "")


def _wrong_side_channel(context: Context) -> Iterator[Found]:
    for each, host in _side_channels(context):
        # Without a trusted network nobody is told an address that others reach.
        is_far = each.has_far_peers and context.kv_transfer.trusted_network
        if not host and not each.on.bind_address:
            continue  # That of a host whose agent has not joined.
        if host in _EVERYWHERE:
            shown = host or "empty"
        elif is_far and host != each.on.bind_address:
            shown = f"{host}, and its host is {each.on.bind_address or 'not known yet'}"
        else:
            continue
        place = context.where_variable(each, _HOST)
        yield Found(f"{_HOST} of {each.role} is {shown}", place)


def _variables(context: Context) -> Iterator[tuple[RoleEngines, str]]:
    for each in vllm_engines(context):
        yield from ((each, name) for name in sorted(each.given_environ) if name[:5] == "VLLM_")


# fmt: off
RULES = (
    error("PD601", "engine_args gives a flag that pdlaunch sets itself.",
        "vLLM would take the last of the two, and pdlaunch would check, watch and route to "
        "something else than what runs. All spellings of a flag count: dashes or underscores, "
        "short names, no-..., one key of a JSON value, and beginnings of a name that vLLM "
        "completes.",
        over=_all_arguments, when=_ours,
        fix="Remove it from engine_args, and use the setting that the finding names.",
        source=_PARSER),
    error("PD602", "engine_args gives a flag with which pdlaunch cannot run an engine.",
        "Data and pipeline parallelism need devices and ports that pdlaunch does not plan; TLS, "
        "gRPC and engines without HTTP cannot be asked by the router.",
        over=_all_arguments, when=_in_table(REFUSED, ":"),
        fix=_REMOVE, source=_PARSER),
    warning("PD603", "engine_args lets an engine run code of others.",
        "That code sees prompts, answers, keys and the KV cache, with the rights of the launch's "
        "user.",
        over=_all_arguments, when=_in_table(FOREIGN_CODE),
        fix="Remove it from engine_args unless you trust whoever wrote that code.", source=_PARSER),
    warning("PD604", "engine_args opens an engine to more than the router needs.",
        "Clients reach such options through the router, and other programs of this machine at an "
        "engine with a fixed port.",
        over=_all_arguments, when=_in_table(DOORS),
        fix=_REMOVE,
        source="The routes and parser of vLLM 0.32: only /v1, /v2 and /inference ask for its key."),
    error("PD605", "KV events are published for everybody.",
        "They hold the token ids of all prompts. Without an endpoint pdlaunch has them published "
        "at a Unix socket in the launch's folder.",
        over=_all_arguments, when=_open_endpoints,
        fix="Leave endpoint and replay_endpoint out; the events are then at a socket of the "
        "launch.",
        source="vLLM's KVEventsConfig: it publishes at tcp://*:5557 by default, without a key."),
    error("PD606", "engine_args cannot be written as flags.",
        "A name with other characters, or a value that looks like a flag, would smuggle a flag "
        "past these checks; of a flag in two spellings one is lost.",
        when=_ambiguous,
        fix="Give each flag once, by its name in vLLM's help, and values that begin with no dash.",
        source=_PARSER),
    error("PD610", "Prefill and decode engines are of different kinds.",
        "A native engine cannot read the KV blocks of vLLM, nor the other way round.",
        over=pair, when=lambda it: it[0].settings.engine != it[1].settings.engine, at="engine",
        message="prefill engines are {0.settings.engine}, decode engines {1.settings.engine}",
        fix="Set engine once, at the top level.", source="KV layouts and handshakes of both kinds.",
    ),
    error("PD611", "The executable of an engine cannot be run.",
        "On another host its agent has to allow it. vLLM may have an environment of its own: "
        "pdlaunch starts it, and imports nothing of it.",
        when=_no_command,
        fix="Install vLLM, or set engine_command to its executable: a name on PATH, or a path. "
        "Start agents of other hosts with --allow-executable.",
        source="execve(2).", needs=("engine_commands",)),
    error("PD612", "Prefill and decode are different versions of vLLM.",
        "Both become healthy; the handshake of the first request fails, and decode computes every "
        "prompt itself.",
        when=_versions_differ,
        fix="Use the same vLLM on both sides: set engine_command once, at the top level.",
        source="vLLM's NIXL handshake refuses another version (compute_nixl_compatibility_hash).",
        needs=("engine_commands",)),
    error("PD614", "Engines of vLLM are to move KV blocks by another connector than NIXL.",
        "pdlaunch starts, proves and measures pairs of vLLM with its NixlConnector alone.",
        over=lambda context: [context.kv_transfer for _ in vllm_pair(context)],
        when=lambda transfer: transfer.connector != "nixl", at="kv_transfer.connector",
        message="connector {0.connector} with engines of vLLM",
        fix="Set kv_transfer.connector to nixl.",
        source="The kv-transfer configuration that pdlaunch gives vLLM."),
    warning("PD615", "A setting has no effect on engines of this kind.",
        "A setting that is ignored gives a wrong idea of what runs.",
        when=_ignored_settings,
        fix="Remove it.", source="The command and environment that pdlaunch gives vLLM."),
    warning("PD616", "vLLM's stock NixlConnector listens without authentication.",
        "UCX listens on TCP, on addresses that other hosts can reach, and takes READs and WRITEs "
        "of KV blocks from whoever can connect; it cannot be told otherwise. What engines open to "
        "peers on other hosts is PD428's subject.",
        when=_stock_listeners, at="engine",
        message="UCX in each engine of vLLM listens on TCP for everybody",
        fix="Use a vLLM whose KV pdlaunch verifies (PD629), with kv_transfer.verify: on: its "
        "connector has UCX listen nowhere. Or use engine: native. In a network namespace of its "
        "own a deployment is safe, though the warning stays.",
        source="Listening sockets of vLLM 0.32 with NIXL 1.5.1 (ss -ltnp)."),
    warning("PD618", "Routes that run methods in an engine are open at its port.",
        "Sleep mode needs vLLM's dev mode, which also adds /collective_rpc, without any key. At a "
        "socket of the launch its user alone can open them.",
        when=_dev_ports,
        fix="Set prefill.port and decode.port to 0, or switch enable_sleep_mode off.",
        source="register_vllm_dev_api_routers of vLLM 0.32; its key guards /v1, /v2 and "
        "/inference."),
    error("PD619", "A lease ends while its request waits in the queue of decode.",
        "vLLM's prefill then gives the blocks to others, the late read succeeds, and decode "
        "answers with the text of another prompt (HTTP 200). Decode renews the lease between two "
        "steps: the time between two renewals and a step must fit into what one adds.",
        when=_short_lease, at="kv_transfer.lease_s",
        fix="Make kv_transfer.lease_s longer (30 is vLLM's own), or lower max_num_batched_tokens.",
        source="vLLM 0.32 (_heartbeat_interval, _lease_extension): from when a request is in its "
        "queue, decode renews the lease every lease // 6 s, each time for lease * 2 // 3 s, "
        "between two steps."),
    error("PD620", "Prefill and decode of vLLM load their model under different names.",
        "Its handshake compares the path or name of the model, even where the files are the same.",
        over=vllm_pair, when=_models_of, at="model",
        fix="Set model once, at the top level.", source=_HANDSHAKE),
    error("PD622", "The block sizes of prefill and decode do not fit.",
        "Decode on a GPU reads blocks that are a part of its own; on a CPU they must be equal. A "
        "side without block_size takes what vLLM chooses.",
        over=vllm_pair, when=_block_sizes, at="block_size",
        fix="Set block_size once, at the top level.", source=_HANDSHAKE),
    error("PD625", "A flag that shapes KV blocks differs between prefill and decode.",
        "Layout, dtype and meaning of the bytes follow from backend, quantization and cache "
        "settings. A drafting model has KV blocks of its own; an engine without the adapter that "
        "a request names answers 404.",
        when=_differing_flags,
        fix="Give both sides the same value, in engine_args at the top level.", source=_HANDSHAKE),
    error("PD626", "The tensor-parallel sizes of prefill and decode do not fit.",
        "The handshake of vLLM ends with an assertion.",
        over=vllm_pair, when=_tp_sizes, at="tensor_parallel_size",
        fix="Choose tensor-parallel sizes of which one divides the other, and no larger one for "
        "prefill than there are KV heads.", source=f"{_HANDSHAKE} TransferTopology.tp_ratio."),
    warning("PD627", "vLLM's KV cache lies in CuMem pools, which NIXL moves at 0.44 GB/s here.",
        "Without fabric handles a peer cannot map such memory, and UCX copies it through the "
        "host, without an error.",
        when=_slow_cumem,
        fix="Switch enable_sleep_mode and enable_cumem_allocator off.",
        source="vLLM 0.24 between two H200s: 0.44 GB/s from CuMem pools (measured).",
        needs=("gpus", "fabric")),
    error("PD628", "vLLM's KV cache lies in expandable segments, which NIXL moves at 0.6 GB/s.",
        "vLLM refuses to start with the one spelling that it looks for; with others it starts and "
        "is slow. Its CuMem allocator switches the segments off for the KV cache.",
        over=lambda context: itertools.chain(*vllm_pair(context)), when=_segments,
        fix="Remove expandable_segments from the variable.",
        source="Measured on two H200s with NIXL 1.5.1; vLLM 0.32 looks for "
        "expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF alone."),
    warning(
        "PD629", "Engines of vLLM use pulled KV blocks unproven, though kv_transfer.verify is on.",
        "pdlaunch's connector proves them, for the versions of vLLM and the models that it knows. "
        "With vLLM's own, a READ that comes after its lease brings another prompt's blocks, and "
        "the answer is wrong with HTTP 200.",
        when=_not_proven, at="kv_transfer.verify",
        fix=f"Have engine_command name a vLLM {', '.join(SUPPORTED_VERSIONS)}; take the argument "
        "out of engine_args; or serve the model with engine: native.",
        source="vLLM 0.32: an expired lease's blocks are reused, and read without an error."),
    error("PD630",
        "The side channel of vLLM binds every address, or tells peers one that is not its own.",
        "Decode would dial 0.0.0.0, which is itself: each handshake finds another engine or none. "
        "Empty, the variable leaves vLLM without the address that pdlaunch gave it.",
        when=_wrong_side_channel,
        fix=f"Unset {_HOST}: pdlaunch gives engines the address to bind and to tell.",
        source="volcano-sh/kthena#1781; vLLM binds and advertises the same variable."),
    warning(
        "PD631", "Other hosts can reach the side channel, and no engine on another host needs it.",
        "It tells everybody where KV blocks are, and a query for a rank that does not exist ends "
        "it.",
        over=_side_channels,
        when=lambda it: not it[0].has_far_peers and it[1] not in _EVERYWHERE
        and not is_loopback(it[1]), at=f"${_HOST}", message=f"{_HOST} of {{0.role}} is {{1}}",
        fix=f"Unset {_HOST}: engines of one host talk over its loopback device.",
        source="vLLM's side channel has no authentication, and one wrong query ends it."),
    error("PD634", "Dev mode is on, though no engine is to sleep.",
        "It adds /collective_rpc, by which whoever can connect runs any method in the engine. "
        "pdlaunch switches it on for sleep mode alone.",
        over=vllm_engines,
        when=lambda each: (value := each.environment.get("VLLM_SERVER_DEV_MODE", "0")) != "0"
        and not each.settings.enable_sleep_mode
        and f"VLLM_SERVER_DEV_MODE of {each.role} is {shown_name(value)}",
        at="$VLLM_SERVER_DEV_MODE",
        fix="Unset VLLM_SERVER_DEV_MODE; enable_sleep_mode switches it on.",
        source="register_vllm_dev_api_routers of vLLM 0.32."),
    warning("PD635", "A variable of vLLM opens an engine, or runs other people's code in it.",
        "That code has the rights of the launch's user, and sees prompts, answers and keys.",
        over=_variables,
        when=lambda it: it[1] in _OPEN
        and it[0].given_environ[it[1]] not in ("", "0", "false", "False")
        and Found(f"{it[1]} {_OPEN[it[1]]}", f"${it[1]}"),
        fix="Unset it.", source=_ENVS),
)
# fmt: on
