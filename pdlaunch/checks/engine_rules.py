"""Rules PD60x to PD63x judge engines of vLLM: flags, executables, settings, pairs, variables.

vLLM compares most properties of a pair only in the handshake of the first request, when both
engines are healthy. If that handshake fails, decode silently computes the prompt itself.
"""

import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from pydantic import JsonValue

from pdlaunch.checks.rule import Context, Found, Pair, differing_place, error, info, warning
from pdlaunch.config import vllm_arguments
from pdlaunch.config.field_types import NATIVE_ALONE
from pdlaunch.config.settings import all_settings
from pdlaunch.planning.role_engines import OWN_VARIABLES, RoleEngines

_PARSER = "The parser of vllm serve 0.32."
_HANDSHAKE = "vLLM 0.32: compute_nixl_compatibility_hash, _validate_remote_agent_handshake."
_REMOVE = "Remove it from engine_args."
# Flags of vLLM that change the layout of KV blocks, or which blocks a request has
_OF_BLOCKS = (
    "attention-backend attention-config decode-context-parallel-size default-mm-loras "
    "disable-hybrid-kv-cache-manager disable-sliding-window enable-lora hf-overrides "
    "kv-cache-dtype kv-cache-dtype-skip-layers kv-sharing-fast-prefill lora-dtype lora-modules "
    "lora-target-modules mamba-block-size mamba-cache-dtype mamba-ssm-cache-dtype max-lora-rank "
    "model-impl quantization quantization-config spec-method spec-model spec-tokens "
    "speculative-config"
)
# Flags of vLLM with which engines store KV in a form that pdlaunch's connector refuses
_SPLITTING = (
    *("decode-context-parallel-size", "spec-method", "spec-model", "spec-tokens"),
    "speculative-config",
)
_PORT, _LAYOUT = "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_SSM_CONV_STATE_LAYOUT"
# The first vLLM with the interface of pdlaunch's connector, and the last version that was tried
_OLDEST, _NEWEST = (0, 24), (0, 33)
_OLDEST_WITH_STATE = (0, 30)
_CACHES_STATES_SINCE = (0, 28)  # with vLLM's own connector, on by default
# The first vLLM that lets a connector allocate the KV cache, and that notifies it of sleep
_POOLS_SINCE = {"enable_cumem_allocator": (0, 31), "enable_sleep_mode": (0, 33)}
# The first vLLM that informs its host tier which blocks are pulled into. Earlier versions may copy
# such a block, and store the bytes of one prompt under the hash of another.
_TIER_SINCE = (0, 33)
_OWN_CONNECTOR = "set kv_transfer.connector to vllm-nixl, which proves nothing"
# vLLM renews a lease between two steps, every ``lease // 6`` seconds, for ``lease * 2 // 3``. With
# 8 s, a step may take 4 s before a renewal comes too late.
MIN_LEASE_S = 8


@dataclass(frozen=True, slots=True)
class EngineArgument:
    """One entry of ``engine_args``."""

    key: str  # the name as the user wrote it
    value: JsonValue
    where: str  # the setting that has this entry

    @property
    def name(self) -> str:
        return vllm_arguments.long_name(self.key)

    @property
    def is_off(self) -> bool:
        return self.value is vllm_arguments.vllm_flag_name(self.key).startswith("no-")

    @property
    def json(self) -> JsonValue:
        """Return the value; the text of a JSON object is parsed."""
        if isinstance(self.value, str) and self.value.startswith("{"):
            try:
                found: JsonValue = json.loads(self.value)
            except ValueError:
                return self.value
            return found
        return self.value


def _arguments(context: Context, each: RoleEngines) -> Iterator[EngineArgument]:
    """Yield the ``engine_args`` of a role; its own entries replace those of the top level."""
    for key, value in each.settings.engine_args.items():
        paths = (f"{each.role}.engine_args.{key}", f"engine_args.{key}")
        where = next((path for path in paths if context.given(path)), paths[1])
        yield EngineArgument(key, value, where)


def _all_arguments(context: Context) -> Iterator[EngineArgument]:
    for each in context.vllm_engines():
        yield from _arguments(context, each)


def _open_endpoints(argument: EngineArgument) -> Iterator[Found]:
    config = argument.json
    if argument.name != vllm_arguments.KV_EVENTS:
        return
    if not isinstance(config, dict) or "." in argument.key:
        fix = "write it as a mapping: enable_kv_cache_events: true"
        yield Found(f"--{argument.name} cannot be checked in this form", argument.where, fix)
        return
    for name in ("endpoint", "replay_endpoint"):
        endpoint = config.get(name)
        if endpoint is not None and not str(endpoint).startswith(("ipc://", "inproc://")):
            message = f"{name} of KV events is {endpoint}, open to other users"
            yield Found(message, argument.where)


def _no_command(context: Context) -> Iterator[Found]:
    for each in context.vllm_engines():
        command = each.settings.engine_command
        problems = [
            f"{f'on {host}: ' if context.launch.spans_hosts else ''}{command}: {found.problem}"
            for host, found in context.engine_commands(each.role).items()
            if found.problem
        ]
        yield from (Found(problem, each.where("engine_command")) for problem in problems)


def _kinds_differ(context: Context) -> str:
    kinds = {role: each.settings.engine for role, each in context.engines.items()}
    found = ", ".join(f"{role} engines are {kind}" for role, kind in kinds.items())
    return found if len(set(kinds.values())) > 1 else ""


def _versions_differ(context: Context) -> Iterator[Found]:
    for sides in context.vllm_pairs():
        commands = [context.engine_commands(side.role).values() for side in sides]
        versions = [sorted({it.version for it in found if it.version}) for found in commands]
        if all(versions) and len({*versions[0], *versions[1]}) > 1:
            prefill, decode = (" and ".join(each) for each in versions)
            place = differing_place(*sides, "engine_command")
            yield Found(f"prefill is vLLM {prefill}, decode vLLM {decode}", place)


def _ignored_settings(context: Context) -> Iterator[Found]:
    native_alone = [path for path, it in all_settings().items() if NATIVE_ALONE in it.info.metadata]
    for each in context.vllm_engines():
        for name in native_alone:
            for path in filter(context.given, dict.fromkeys((name, f"{each.role}.{name}"))):
                yield Found(f"{name} does nothing for engines of vLLM", path)
    for each in context.engines.values():
        for name in ("engine_args", "engine_command") if each.is_native else ():
            for path in context.origins:
                starts = (name, f"{each.role}.{name}")
                if path in starts or path.startswith(tuple(f"{start}." for start in starts)):
                    yield Found(f"{name} does nothing for native engines", path)


def _own_variables(context: Context) -> Iterator[Found]:
    for each in context.vllm_engines():
        # An engine over several hosts cannot have one address for all of them.
        own = OWN_VARIABLES | {_PORT} | ({"VLLM_HOST_IP"} if each.settings.nnodes > 1 else set())
        for name in sorted(own & each.settings.env.keys()):
            yield Found(
                f"{name} is set for {each.role} engines", context.where_variable(each, name)
            )


def _stock_pairs(context: Context) -> list[Pair]:
    """Return pairs of vLLM engines with vLLM's own connector; none with pdlaunch's connector."""
    return context.vllm_pairs() if context.kv_transfer.is_stock else []


def _our_sides(context: Context) -> Iterator[RoleEngines]:
    return itertools.chain(*(() if context.kv_transfer.is_stock else context.vllm_pairs()))


def _given(
    context: Context, engines: Iterable[RoleEngines], names: Collection[str], text: str
) -> Iterator[Found]:
    """Find arguments of these names that are not off. ``text`` is formatted with key and role."""
    for each in engines:
        for argument in _arguments(context, each):
            if argument.name in names and not argument.is_off:
                yield Found(text.format(argument.key, each.role), argument.where)


def _cumem(context: Context) -> Iterator[Found]:
    for each in _our_sides(context):
        for name, since in _POOLS_SINCE.items() if each.device == "cuda" else ():
            if getattr(each.settings, name) and _is_before(context, each, since):
                message = f"{name} keeps the KV cache of {each.role} engines from their peers"
                yield Found(message, each.where(name))


def _offloading(context: Context) -> Iterator[Found]:
    for each in itertools.chain(*context.vllm_pairs()):
        backend, size = vllm_arguments.host_tier_of(each.settings.engine_args)
        reason = ""
        if context.kv_transfer.is_stock:
            reason = "it would replace their KV connector"
        elif backend not in (None, "native"):
            reason = f"the backend {backend} was never tried with pdlaunch's connector"
        elif size and not re.fullmatch(r"\d+(\.\d+)?", str(size)):
            reason = f"{size} is not a number of GiB"
        if reason:
            text = f"--{{}} of {{}} engines: {reason}"
            yield from _given(context, [each], vllm_arguments.OFFLOADING, text)


def _early_tier(context: Context) -> Iterator[Found]:
    text = "--{} of {} engines may copy a block during a pull into this block"
    for each in _our_sides(context):
        _, size = vllm_arguments.host_tier_of(each.settings.engine_args)
        if size and _is_before(context, each, _TIER_SINCE):
            yield from _given(context, [each], vllm_arguments.OFFLOADING, text)


def _is_before(context: Context, each: RoleEngines, since: tuple[int, int]) -> bool:
    """Return True if an executable of this role was looked at and is older, or of no version."""
    versions = [numbers for _, numbers in _versions_of(context, each)]
    return bool(context.engine_commands(each.role)) and min(versions, default=()) < since


def _versions_of(context: Context, each: RoleEngines) -> Iterator[tuple[str, tuple[int, ...]]]:
    for found in context.engine_commands(each.role).values():
        if numbers := re.findall(r"\d+", found.version or ""):
            yield str(found.version), tuple(map(int, numbers[:2]))


def _versions(context: Context) -> Iterator[tuple[RoleEngines, tuple[str, tuple[int, ...]]]]:
    for each in _our_sides(context):
        yield from ((each, version) for version in _versions_of(context, each))


def _cached_states(context: Context) -> Iterator[Found]:
    name = "enable_prefix_caching"
    for prefill, decode in _stock_pairs(context):
        is_old = _is_before(context, decode, _CACHES_STATES_SINCE)
        is_default = bool(context.engine_commands(decode.role)) and not is_old
        is_on = decode.settings.enable_prefix_caching and (name in decode.given or is_default)
        if not decode.model.has_state or not is_on:
            continue
        place, sizes = decode.where(name), [(it.tp_size, it.block_size) for it in (prefill, decode)]
        if is_old:
            yield Found(f"{name} is on for decode, whose vLLM is older than 0.28", place)
        elif sizes[0] != sizes[1]:
            default = "" if name in decode.given else " by default"
            message = f"{name} is on{default}, and TP or block sizes of prefill and decode differ"
            yield Found(message, place)


def _caches_with_unknown_vllm(context: Context) -> Iterator[Found]:
    name = "enable_prefix_caching"
    for _, decode in _stock_pairs(context):
        is_on = name in decode.given and decode.settings.enable_prefix_caching
        if decode.model.has_state and is_on and not context.engine_commands(decode.role):
            yield Found(at=decode.where(name))


def _models_of(sides: Pair) -> Found | None:
    prefill, decode = (side.model.path or side.settings.model for side in sides)
    return Found(f"prefill loads {prefill}, decode {decode}") if prefill != decode else None


def _tp_sizes(sides: Pair) -> Found | None:
    prefill, decode = (side.tp_size for side in sides)
    stages = [side.settings.pipeline_parallel_size for side in sides]
    if max(stages) > 1 and (stages[0] != stages[1] or prefill != decode):
        message = f"prefill has {stages[0]} stages of {prefill} ranks, decode {stages[1]} of "
        fix = "give both sides the same pipeline_parallel_size and tensor_parallel_size"
        return Found(f"{message}{decode}", sides[1].where("pipeline_parallel_size"), fix)
    sizes = f"prefill has {prefill} ranks an engine, decode {decode}"
    shape = sides[0].shape
    heads = shape.num_kv_heads if shape is not None and not shape.is_latent else None
    if prefill % decode and decode % prefill:
        return Found(sizes)
    if prefill > decode and heads is not None and prefill > heads:
        place = sides[0].where("tensor_parallel_size")
        return Found(f"{sizes}, and the model has {heads} KV heads", place)
    return None


def _differing_flags(context: Context) -> Iterator[Found]:
    for sides in context.vllm_pairs():
        flags = [_flags_of(context, side) for side in sides]
        for key in dict.fromkeys((*flags[0], *flags[1])):
            values = [str(side[key][0]) if key in side else "not given" for side in flags]
            if values[0] != values[1]:
                _, place = flags[1].get(key) or flags[0][key]
                message = f"--{key} of prefill is {values[0]}, of decode {values[1]}"
                yield Found(message, place)


def _flags_of(context: Context, each: RoleEngines) -> dict[str, tuple[JsonValue, str]]:
    """Return long name or path in JSON -> value and place of each flag in ``_OF_BLOCKS``."""
    flags = [it for it in _arguments(context, each) if it.name in _OF_BLOCKS.split()]
    names = [f"{it.name}.{it.key.partition('.')[2]}".rstrip(".") for it in flags]
    values = [(False if it.is_off else it.json, it.where) for it in flags]
    return dict(zip(names, values, strict=True))


# fmt: off
RULES = (
    error("PD601", "engine_args gives a flag that pdlaunch sets itself.",
        "vLLM uses the last of two equal flags, so pdlaunch would check, watch and route to an "
        "engine with other values than it expects. The rule finds all spellings of a flag: dashes "
        "or underscores, short names, no-..., one key of a JSON value, and abbreviated names that "
        "vLLM completes.",
        over=_all_arguments,
        when=lambda it: it.name in vllm_arguments.OURS
        and Found(f"pdlaunch sets --{it.name} itself", it.where, vllm_arguments.OURS[it.name]),
        fix="Remove it from engine_args, and use the setting that the finding names.",
        source=_PARSER),
    error("PD602", "engine_args gives a flag with which pdlaunch cannot run an engine.",
        "pdlaunch plans data parallel ranks on one host only. The router cannot call engines over "
        "TLS or gRPC, or engines without HTTP.",
        over=_all_arguments,
        when=lambda it: it.name in vllm_arguments.REFUSED and not it.is_off
        and Found(f"--{it.name}: {vllm_arguments.REFUSED[it.name]}", it.where),
        fix=_REMOVE, source=_PARSER),
    error("PD605", "Other users can read the KV events.",
        "The events contain the token ids of all prompts. Without an endpoint, pdlaunch sets a "
        "Unix socket in the launch's folder.",
        over=_all_arguments, when=_open_endpoints,
        fix="Remove endpoint and replay_endpoint; vLLM then publishes at a socket of the "
        "launch.",
        source="vLLM's KVEventsConfig: it publishes at tcp://*:5557 by default, without a key."),
    error("PD610", "The engines of a launch are of different kinds.",
        "A native engine cannot read the KV blocks of vLLM, nor the other way round.",
        when=_kinds_differ, at="engine",
        fix="Set engine once, at the top level.", source="KV layouts and handshakes of both kinds.",
    ),
    error("PD611", "The executable of an engine cannot be run.",
        "On another host, its agent has to allow the executable. vLLM may have its own "
        "environment: pdlaunch starts vLLM and imports nothing from it.",
        when=_no_command,
        fix="Install vLLM, or set engine_command to its executable: a name on PATH, or a path. "
        "Start agents of other hosts with --allow-executable.",
        source="execve(2).", needs=("engine_commands",)),
    error("PD612", "Prefill and decode are different versions of vLLM.",
        "Both engines become healthy, but the handshake of the first request fails, and decode "
        "computes every prompt itself.",
        when=_versions_differ,
        fix="Use the same vLLM on both sides: set engine_command once, at the top level.",
        source="vLLM's NIXL handshake refuses another version (compute_nixl_compatibility_hash).",
        needs=("engine_commands",)),
    error("PD613", "vLLM is too old for pdlaunch's KV connector.",
        "The connector needs the interface that vLLM has had since 0.24.",
        over=_versions, when=lambda it: it[1][1] < _OLDEST, at="engine_command",
        message="engine_command of {0.role} is vLLM {1[0]}",
        fix=f"Install vLLM 0.24 or later, or {_OWN_CONNECTOR}.",
        source="vllm/distributed/kv_transfer/kv_connector/v1/base.py of vLLM 0.24 to 0.33.",
        needs=("engine_commands",)),
    error("PD614", "Native engines cannot use vLLM's own KV connector.",
        "Only vLLM has this connector.",
        over=lambda context: context.engines.values() if context.kv_transfer.is_stock else (),
        when=lambda each: each.is_native, at="kv_transfer.connector",
        message="kv_transfer.connector is vllm-nixl, and the engines are native",
        fix="Set kv_transfer.connector to nixl, mooncake or file, or use engine: vllm.",
        source="NixlConnector is a class of vLLM."),
    warning("PD615", "A setting has no effect on engines of this kind.",
        "The engine ignores the setting, so the configuration looks different from what runs.",
        when=_ignored_settings,
        fix="Remove it.", source="The command and environment that pdlaunch gives vLLM."),
    warning("PD617", "vLLM is newer than the versions tried with pdlaunch's KV connector.",
        "Its interface may have changed. Each pair is proven with real blocks before it serves.",
        over=_versions, when=lambda it: it[1][1] > _NEWEST, at="engine_command",
        message="engine_command of {0.role} is vLLM {1[0]}",
        fix="Use vLLM 0.33 if the launch does not become ready.",
        source="vLLM 0.24 to 0.33.", needs=("engine_commands",)),
    warning("PD618", "Every local user can run methods in an engine through its port.",
        "Sleep mode needs vLLM's dev mode, which also adds /collective_rpc, without a key. At a "
        "Unix socket of the launch, only the user of the launch can call these routes.",
        # On several hosts the port belongs to a sidecar, which checks the launch's token.
        over=lambda context: () if context.launch.spans_hosts else context.vllm_engines(),
        when=lambda each: each.settings.enable_sleep_mode and each.ports
        and Found(at=f"{each.role}.port"),
        message="enable_sleep_mode opens /collective_rpc there",
        fix="Set prefill.port and decode.port to 0, or switch enable_sleep_mode off.",
        source="register_vllm_dev_api_routers of vLLM 0.32; its key protects only /v1, /v2 and "
        "/inference."),
    error("PD619", "A lease may end while its request waits in the queue of decode.",
        "vLLM's prefill then gives the blocks to other requests, the late read succeeds, and "
        "decode answers with the text of another prompt (HTTP 200). Decode renews the lease only "
        "between two steps: each renewal must last for the time to the next one plus a step.",
        over=lambda context: [context.kv_transfer for _ in _stock_pairs(context)],
        when=lambda transfer: transfer.lease_s < MIN_LEASE_S, at="kv_transfer.lease_s",
        message=f"lease_s is {{0.lease_s:g}}, less than {MIN_LEASE_S}",
        fix=f"Set kv_transfer.lease_s to {MIN_LEASE_S} or more; 30 is vLLM's own.",
        source="vLLM 0.32 (_heartbeat_interval, _lease_extension): as soon as a request is in its "
        "queue, decode renews the lease every lease // 6 s, each time for lease * 2 // 3 s, "
        "between two steps."),
    error("PD620", "Prefill and decode of vLLM load the model under different names.",
        "The handshake of vLLM's own connector compares the path or name of the model. It fails "
        "if these differ, even with equal files.",
        over=_stock_pairs, when=_models_of, at="model",
        fix="Set model once, at the top level.", source=_HANDSHAKE),
    error("PD621", "The host tier of vLLM does not work with the KV connector of a pair.",
        "Such a host tier replaces the connector, or was never tried beside it.",
        when=_offloading,
        fix=f"{_REMOVE[:-1]}, or use the backend native and pdlaunch's own connector.",
        source="OffloadingConnectorScheduler of vLLM 0.24 to 0.33."),
    error("PD638", "vLLM is too old for a host tier beside pdlaunch's KV connector.",
        "The tier may copy a block during a pull into this block, and so store the bytes of one "
        "prompt under the hash of another.",
        when=_early_tier, fix=f"{_REMOVE[:-1]}, or use vLLM 0.33.",
        source="OffloadingConnectorScheduler.update_state_after_alloc of vLLM 0.24 to 0.33.",
        needs=("engine_commands",)),
    error("PD623", "Peers cannot map memory of vLLM's CuMem allocator.",
        "Its allocations have no handles for peers: NIXL reads them at 0.6 GB/s.",
        when=_cumem,
        fix=f"Remove both settings, use vLLM 0.33, or {_OWN_CONNECTOR}.",
        source="vLLM's csrc/cumem_allocator.cpp; measured with vLLM 0.24 on two H200s.",
        needs=("engine_commands",)),
    error("PD624", "engine_args has a flag whose KV pdlaunch's connector does not move.",
        "A draft model and decode-context parallelism store KV that the connector neither moves "
        "nor proves.",
        when=lambda it: _given(
            it, _our_sides(it), _SPLITTING, "--{} of {} engines stores KV that cannot be proven"),
        fix=f"Remove it from engine_args, or {_OWN_CONNECTOR}.", source="pdlaunch's connector."),
    error("PD625", "A flag that changes KV blocks differs between prefill and decode.",
        "Backend, quantization and cache settings determine the layout, dtype and meaning of the "
        "bytes. A draft model has its own KV blocks. An engine without the adapter that a request "
        "names answers 404.",
        when=_differing_flags,
        fix="Give both sides the same value, in engine_args at the top level.", source=_HANDSHAKE),
    error("PD626", "The tensor-parallel sizes of prefill and decode do not fit.",
        "The handshake fails. A pipeline stage takes KV only of a stage with the same layers, and "
        "of ranks with the same heads.",
        over=Context.vllm_pairs, when=_tp_sizes, at="tensor_parallel_size",
        fix="Choose tensor-parallel sizes of which one divides the other. The size of prefill must "
        "not exceed the number of KV heads.", source=f"{_HANDSHAKE} TransferTopology.tp_ratio."),
    warning("PD629", "Engines of vLLM use pulled KV blocks without a proof.",
        "With vLLM's own connector, a READ after the end of its lease returns another prompt's "
        "blocks, and the answer is wrong with HTTP 200. Its UCX listens on TCP, where anyone who "
        "can connect can read and write KV blocks.",
        over=_stock_pairs, when=lambda _: True, at="kv_transfer.connector",
        message="wrong KV blocks would go unnoticed: kv_transfer.connector is vllm-nixl",
        fix="Set kv_transfer.connector to nixl.",
        source="vLLM 0.32: an expired lease's blocks are reused, and read without an error."),
    error("PD632", "vLLM is too old to transfer the states of a hybrid model.",
        "Layers of Mamba or linear attention have a state instead of KV blocks. Before 0.30 vLLM "
        "ignores failed loads of such states, and the engine exits at its start.",
        over=_versions, when=lambda it: it[0].model.has_state and it[1][1] < _OLDEST_WITH_STATE,
        at="engine_command", message="engine_command of {0.role} is vLLM {1[0]}",
        fix="Install vLLM 0.30 or later.", source="KVConnectorTransferResults of vLLM 0.30.",
        needs=("engine_commands",)),
    error("PD633", "vLLM's connector needs another layout for the states of a hybrid model.",
        "The workers of vLLM fail with an assertion at their start.",
        over=lambda context: itertools.chain(*_stock_pairs(context)),
        when=lambda each: each.model.has_state and each.given_environ.get(_LAYOUT) != "DS",
        at="env", message=f"{_LAYOUT} of {{0.role}} engines is not DS",
        fix=f"Set {_LAYOUT}: DS in env.", source="vLLM 0.32: nixl/base_worker.py."),
    warning("PD636", "Decode keeps states of a hybrid model in its prefix cache.",
        "Before 0.28, decode exits with the assertion 'SSM can only have one local block' at the "
        "first cache hit (the cache is off by default). Later versions cache states by default. "
        "They refuse the handshake if the attention blocks of both sides hold different numbers "
        "of tokens, as with different TP sizes.",
        when=_cached_states,
        fix="Set decode.enable_prefix_caching to false, or use vLLM 0.28 or newer "
        "and equal TP and block sizes.",
        source="ai-dynamo/dynamo#12197; vllm-project/vllm#42554; vllm-project/vllm#50991 (the "
        "default, since 0.28); nixl/base_worker.py of vLLM 0.24, 0.32 and 0.33."),
    info("PD639", "Decode caches states of a hybrid model, which needs vLLM 0.28.",
        "Before 0.28, decode exits at the first cache hit (PD636). The version of an executable on "
        "another machine is not known.",
        when=_caches_with_unknown_vllm,
        message="enable_prefix_caching of decode needs vLLM 0.28 or newer",
        fix="Set decode.enable_prefix_caching to false for an older vLLM.",
        source="ai-dynamo/dynamo#12197; vllm-project/vllm#42554."),
    error("PD630", "env gives a variable of vLLM that pdlaunch sets itself.",
        "The side channel reports to every caller where KV blocks are, and decode connects to the "
        "address that prefill binds. Dev mode adds /collective_rpc, which lets anyone who can "
        "connect run any method in the engine. pdlaunch overwrites these variables.",
        when=_own_variables,
        fix="Remove it from env; enable_sleep_mode switches dev mode on.",
        source="volcano-sh/kthena#1781; register_vllm_dev_api_routers of vLLM 0.32."),
)
# fmt: on
