"""Rules PD63x judge variables of vLLM in the environment of its engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pdlaunch.checks.context import Context
from pdlaunch.checks.other_engines import vllm_engines, vllm_pair
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.http_names import is_loopback
from pdlaunch.config.problems import nearest, shown_name
from pdlaunch.planning.role_engines import RoleEngines

_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
_SOURCE = "vllm/envs.py of vLLM 0.32."
_EVERYWHERE = ("", "*", "0.0.0.0", "::")

OF_EACH_ENGINE: Mapping[str, str] = {
    "VLLM_API_KEY": "engines get engine_api_key, or none",
    "VLLM_NIXL_SIDE_CHANNEL_PORT": "each engine gets a free port of its own: with one for all, "
    "the second of a role would wait for it for ever",
    "VLLM_RPC_BASE_PATH": "the sockets of an engine are in the launch's folder",
}
"""Variables that the sidecar sets in place of the user's, with the reason."""
CONTRADICTORY: Mapping[str, str] = {
    "VLLM_DP_MASTER_IP": "pdlaunch starts no ranks of data parallelism",
    "VLLM_DP_MASTER_PORT": "pdlaunch starts no ranks of data parallelism",
    "VLLM_DP_RANK": "it moves the port of the side channel away from the engine's own",
    "VLLM_DP_RANK_LOCAL": "pdlaunch starts no ranks of data parallelism",
    "VLLM_DP_SIZE": "the engine would wait for further ranks that nobody starts",
    "VLLM_PORT": "all engines would count up from the same port",
}
"""Variables that contradict the planned processes."""
_OPEN: Mapping[str, str] = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "lets messages between processes hold code (pickle)",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "lets clients load adapters from any folder",
    "VLLM_PLUGINS": "runs code of these packages in the engine",
}
_COUNTERPARTS = {
    "VLLM_CPU_KVCACHE_SPACE": "kv_cache_memory",
    "VLLM_CPU_OMP_THREADS_BIND": "num_threads",
}


@rule(
    "PD630",
    "error",
    fix=f"Unset {_HOST}: pdlaunch gives engines the address to bind and to tell.",
    source="volcano-sh/kthena#1781; vLLM binds and advertises the same variable.",
)
def side_channel_host(context: Context) -> Iterator[Found]:
    """The side channel of vLLM binds every address, or tells peers one that is not its own.

    Decode would dial 0.0.0.0, which is itself: each handshake finds another engine or none. Peers
    on other hosts find themselves at localhost too, and nobody at an address that is not their
    host's. Empty, the variable leaves vLLM without the address that pdlaunch gave it.
    """
    for engines in _on_hosts(context):
        host = engines.environment.get(_HOST, "")
        # Without a trusted network nobody is told an address that others reach.
        is_far = engines.has_far_peers and context.config.kv_transfer.trusted_network
        if not host and not engines.bind_address:
            continue  # that of a host whose agent has not joined
        if host in _EVERYWHERE:
            shown = host or "empty"
        elif is_far and host != engines.bind_address:
            shown = f"{host}, and its host is {engines.bind_address or 'not known yet'}"
        else:
            continue
        yield Found(context.where_variable(engines, _HOST), f"{_HOST} of {engines.role} is {shown}")


@rule(
    "PD631",
    "warning",
    fix=f"Unset {_HOST}: engines of one host talk over its loopback device.",
    source="vLLM's side channel has no authentication, and one wrong query ends it.",
)
def side_channel_reachable(context: Context) -> Iterator[Found]:
    """Other hosts can reach the side channel, and no engine on another host needs it.

    It tells everybody where KV blocks are, and a query for a rank that does not exist ends it.
    """
    for engines in _on_hosts(context):
        host = engines.environment.get(_HOST, "")
        if not engines.has_far_peers and host not in _EVERYWHERE and not is_loopback(host):
            yield Found(
                context.where_variable(engines, _HOST), f"{_HOST} of {engines.role} is {host}"
            )


@rule(
    "PD632",
    "warning",
    fix="Unset it.",
    source="The environment that each engine of a launch is started with.",
)
def variable_of_each_engine(context: Context) -> Iterator[Found]:
    """A variable is given that pdlaunch sets for each engine.

    The given value has no effect.
    """
    for engines, name in _given(context):
        if name in OF_EACH_ENGINE:
            yield Found(
                context.where_variable(engines, name),
                f"{name} has no effect: {OF_EACH_ENGINE[name]}",
            )


@rule(
    "PD633",
    "error",
    fix="Unset it; prefill.replicas and decode.replicas start several engines.",
    source="vLLM 0.32: ParallelConfig, get_open_port, side channel port + data_parallel_index.",
)
def variable_contradicts(context: Context) -> Iterator[Found]:
    """A variable of vLLM contradicts the processes that pdlaunch plans.

    An engine would wait for ranks that nobody starts, or listen where nobody asks.
    """
    for engines, name in _given(context):
        if name in CONTRADICTORY:
            yield Found(
                context.where_variable(engines, name), f"{name} is set: {CONTRADICTORY[name]}"
            )


@rule(
    "PD634",
    "error",
    fix="Unset VLLM_SERVER_DEV_MODE; enable_sleep_mode switches it on.",
    source="register_vllm_dev_api_routers of vLLM 0.32.",
)
def dev_mode(context: Context) -> Iterator[Found]:
    """Dev mode is on, though no engine is to sleep.

    It adds /collective_rpc, by which whoever can connect runs any method in the engine, and other
    routes without a key. pdlaunch switches it on for sleep mode alone.
    """
    for engines in vllm_engines(context):
        value = engines.environment.get("VLLM_SERVER_DEV_MODE", "0")
        if value != "0" and not engines.settings.enable_sleep_mode:
            yield Found(
                context.where_variable(engines, "VLLM_SERVER_DEV_MODE"),
                f"VLLM_SERVER_DEV_MODE of {engines.role} is {shown_name(value)}",
            )


@rule(
    "PD635",
    "warning",
    fix="Unset it.",
    source=_SOURCE,
)
def variable_opens_a_door(context: Context) -> Iterator[Found]:
    """A variable of vLLM opens an engine, or runs other people's code in it.

    That code has the rights of the launch's user, and sees prompts, answers and keys.
    """
    for engines, name in _given(context):
        if name in _OPEN and engines.given_environ[name] not in ("", "0", "false", "False"):
            yield Found(context.where_variable(engines, name), f"{name} {_OPEN[name]}")


@rule(
    "PD636",
    "warning",
    fix="Unset the variable; the setting that the finding names does the same.",
    source=_SOURCE,
)
def variable_beside_setting(context: Context) -> Iterator[Found]:
    """A variable of vLLM and a setting of pdlaunch say two things.

    In env the variable wins, and checks judge the setting; in the shell it has no effect.
    """
    for engines, name in _given(context):
        setting = _COUNTERPARTS.get(name)
        if setting is not None and engines.device == "cpu":
            place = context.where_variable(engines, name)
            effect = "has no effect" if place.startswith("environment ") else "is not checked"
            yield Found(place, f"{name} {effect}; it is {setting} here", f"set {setting} instead")


@rule(
    "PD637",
    "warning",
    fix="Correct the name, or unset the variable.",
    source="The names in vllm/envs.py of the installed vLLM.",
    needs=("engine_commands",),
)
def variable_unknown(context: Context) -> Iterator[Found]:
    """A variable of vLLM is misspelt.

    vLLM does not look at it.
    """
    for engines, name in _given(context):
        told = [found.variables for found in context.engine_commands(engines.role).values()]
        # It may be one that the vLLM of another host knows.
        known = frozenset().union(*(each for each in told if each is not None))
        if told and None not in told and name not in known:
            meant = nearest(name, known)
            yield Found(
                context.where_variable(engines, name),
                f"vLLM has no variable {shown_name(name)}",
                f"did you mean {meant}?" if meant else None,
            )


@rule(
    "PD638",
    "error",
    fix="Set the variables once, in env at the top level.",
    source="Variables that shape KV blocks, or choose how they are computed.",
)
def variables_differ(context: Context) -> Iterator[Found]:
    """A variable that shapes KV blocks differs between prefill and decode.

    Blocks are handed over as bytes: in another layout they are other numbers.
    """
    if (pair := vllm_pair(context)) is None:
        return
    for name in ("VLLM_KV_CACHE_LAYOUT", "VLLM_ATTENTION_BACKEND", "VLLM_MLA_DISABLE"):
        values = [side.given_environ.get(name, "not set") for side in pair]
        if values[0] != values[1]:
            side = pair[1] if name in pair[1].given_environ else pair[0]
            yield Found(
                context.where_variable(side, name),
                f"{name} of prefill is {values[0]}, of decode {values[1]}",
            )


def _on_hosts(context: Context) -> Iterator[RoleEngines]:
    """Yield the engines of vLLM, by role and host."""
    for here in context.launch.placed.by_host.values():
        yield from (engines for engines in here.values() if engines.settings.engine == "vllm")


def _given(context: Context) -> Iterator[tuple[RoleEngines, str]]:
    """Yield the variables of vLLM that the user gives, for each role."""
    for engines in vllm_engines(context):
        for name in sorted(engines.given_environ):
            if name.startswith("VLLM_"):
                yield engines, name
