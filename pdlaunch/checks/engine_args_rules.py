"""Rules PD60x judge ``engine_args``, the flags that a user hands on to ``vllm serve``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from pydantic import JsonValue

from pdlaunch.checks.context import Context
from pdlaunch.checks.other_engines import EngineArgument, arguments, vllm_engines
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.problems import nearest, shown_name
from pdlaunch.config.vllm_arguments import (
    DOORS,
    FOREIGN_CODE,
    KV_EVENTS,
    OURS,
    REFUSED,
    is_name,
    values_like_flags,
    vllm_flag_name,
)

_SOURCE = "The parser of vllm serve 0.32."


@rule(
    "PD601",
    "error",
    fix="Remove it from engine_args, and use the setting that the finding names.",
    source=_SOURCE,
)
def argument_is_ours(context: Context) -> Iterator[Found]:
    """engine_args gives a flag that pdlaunch sets itself.

    vLLM would take the last of the two, and pdlaunch would check, watch and route to something else
    than what runs. All spellings of a flag count: dashes or underscores, short names, no-..., one
    key of a JSON value, and beginnings of a name that vLLM completes.
    """
    for argument, instead in _in_table(context, OURS):
        yield Found(argument.where, f"pdlaunch sets --{argument.name} itself", instead)


@rule(
    "PD602",
    "error",
    fix="Remove it from engine_args.",
    source=_SOURCE,
)
def argument_unsupported(context: Context) -> Iterator[Found]:
    """engine_args gives a flag with which pdlaunch cannot run an engine.

    Data and pipeline parallelism need devices and ports that pdlaunch does not plan; TLS, gRPC and
    engines without HTTP cannot be asked by the router. Expert parallelism (enable-expert-parallel)
    and LoRA (enable-lora, lora-modules) are handed on.
    """
    for argument, reason in _in_table(context, REFUSED):
        yield Found(argument.where, f"--{argument.name}: {reason}")


@rule(
    "PD603",
    "warning",
    fix="Remove it from engine_args unless you trust whoever wrote that code.",
    source=_SOURCE,
)
def argument_runs_code(context: Context) -> Iterator[Found]:
    """engine_args lets an engine run code of others.

    That code sees prompts, answers, keys and the KV cache, with the rights of the launch's user.
    """
    for argument, effect in _in_table(context, FOREIGN_CODE):
        yield Found(argument.where, f"--{argument.name} {effect}")


@rule(
    "PD604",
    "warning",
    fix="Remove it from engine_args.",
    source="The routes and parser of vLLM 0.32: only /v1, /v2 and /inference ask for its key.",
)
def argument_opens_a_door(context: Context) -> Iterator[Found]:
    """engine_args opens an engine to more than the router needs.

    Clients reach such options through the router, and other programs of this machine at an engine
    with a fixed port.
    """
    for argument, effect in _in_table(context, DOORS):
        yield Found(argument.where, f"--{argument.name} {effect}")


@rule(
    "PD605",
    "error",
    fix="Leave endpoint and replay_endpoint out; the events are then at a socket of the launch.",
    source="vLLM's KVEventsConfig: it publishes at tcp://*:5557 by default, without a key.",
)
def events_for_everybody(context: Context) -> Iterator[Found]:
    """KV events are published for everybody.

    They hold the token ids of all prompts. Without an endpoint pdlaunch has them published at a
    Unix socket in the launch's folder, which the user of the launch alone can open.
    """
    for engines in vllm_engines(context):
        for argument in arguments(context, engines):
            if argument.name == KV_EVENTS:
                yield from _open_endpoints(argument)


@rule(
    "PD606",
    "error",
    fix="Give each flag once, by its name in vLLM's help, and values that begin with no dash.",
    source=_SOURCE,
)
def arguments_ambiguous(context: Context) -> Iterator[Found]:
    """engine_args cannot be written as flags.

    A name with other characters, or a value that looks like a flag, would smuggle a flag past these
    checks; of a flag in two spellings one is lost.
    """
    for engines in vllm_engines(context):
        given = list(arguments(context, engines))
        for argument in given:
            if not is_name(argument.key):
                yield Found(argument.where, f"{shown_name(argument.key)} is not the name of a flag")
            elif any(values_like_flags(argument.value)):
                yield Found(
                    argument.where, f"vLLM would take the value of {argument.key} for flags"
                )
        for name, count in Counter(vllm_flag_name(argument.key) for argument in given).items():
            if count > 1:
                keys = [each for each in given if vllm_flag_name(each.key) == name]
                spelt = " and ".join(each.key for each in keys)
                yield Found(keys[-1].where, f"--{name} is given {count} times, as {spelt}")


@rule(
    "PD607",
    "error",
    fix="Correct the name; vllm serve --help=all lists them.",
    source="The installed vLLM, which --probe asks.",
    needs=("engine_flags",),
)
def argument_unknown(context: Context) -> Iterator[Found]:
    """The installed vLLM has no such flag.

    It would end before it loads anything.
    """
    for engines in vllm_engines(context):
        answer = (context.probes.engine_flags or {}).get(engines.role)
        if answer is None or answer.problem:
            continue  # PD611 speaks of commands that do not answer.
        for argument in arguments(context, engines):
            name = f"--{vllm_flag_name(argument.key).partition('.')[0]}"
            # argparse completes what fits one flag alone.
            completed = [flag for flag in answer.names if flag.startswith(name)]
            if name not in answer.names and len(completed) != 1:
                meant = nearest(name, answer.names)
                hint = f"did you mean {meant}?" if meant else None
                yield Found(argument.where, f"vLLM has no flag {shown_name(name)}", hint)


def _in_table(context: Context, table: Mapping[str, str]) -> Iterator[tuple[EngineArgument, str]]:
    """Yield the arguments in a table, with its text; what is switched off opens nothing."""
    for engines in vllm_engines(context):
        for argument in arguments(context, engines):
            if argument.name in table and (table is OURS or not argument.is_off):
                yield argument, table[argument.name]


def _open_endpoints(argument: EngineArgument) -> Iterator[Found]:
    if not isinstance(argument.json, dict) or "." in argument.key:
        yield Found(
            argument.where,
            f"--{KV_EVENTS} cannot be checked in this form",
            "write it as a mapping: enable_kv_cache_events: true",
        )
        return
    config: dict[str, JsonValue] = argument.json
    for name in ("endpoint", "replay_endpoint"):
        endpoint = config.get(name)
        if endpoint is not None and not str(endpoint).startswith(("ipc://", "inproc://")):
            yield Found(argument.where, f"{name} of KV events is {endpoint}, open to other users")
