"""``pdlaunch check-config`` finds faults of a deployment; ``explain`` describes a rule."""

import json
import os
from dataclasses import replace
from pathlib import Path

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.checks.probed import PairTransport, Probes, probe_launch
from pdlaunch.checks.run import Report, all_rules, family, run_checks
from pdlaunch.cli import EXIT_UNUSABLE
from pdlaunch.cli.bench import run_module
from pdlaunch.cli.findings import StrictOption, print_report, refuse_input
from pdlaunch.cli.flags import with_serve_flags
from pdlaunch.cli.output import FormatOption, print_errors
from pdlaunch.cli.preflight import AssumeOption, judged_machine, load_launch
from pdlaunch.cli.status import pair_line
from pdlaunch.config.connectors import VLLM_NIXL
from pdlaunch.config.model_files.download import fetch_part
from pdlaunch.config.problems import nearest, shown_name
from pdlaunch.config.roles import PAIR
from pdlaunch.engine.kvcache.groups import num_kv_heads_of_rank
from pdlaunch.errors import ConfigError
from pdlaunch.launch.engines import kind_of
from pdlaunch.launch.places import transport_of
from pdlaunch.machine.facts import VISIBLE_DEVICES
from pdlaunch.planning.models import read_models, read_models_elsewhere
from pdlaunch.planning.plan import planned_hosts
from pdlaunch.planning.resolve import ResolvedLaunch, resolve_on
from pdlaunch.protocol.control import PairReady


@with_serve_flags
def check_config(
    config: Path | None = None,
    output: FormatOption = "table",
    strict: StrictOption = False,
    assume: AssumeOption = None,
    probe: bool = typer.Option(
        False, "--probe", help="Also measure the first pair of ranks on this machine."
    ),
    *,
    flags: dict[str, object],
) -> None:
    """Find faults of a deployment without starting it, for this machine or another one.

    Rules that need an unknown fact are listed as not checked. `pdlaunch explain CODE` describes a
    rule.
    """
    if probe and assume is not None:
        raise typer.BadParameter("--probe measures this machine, so it excludes --assume")
    try:
        loaded = load_launch(config, flags)
        machine, assumed = judged_machine(assume, loaded.config)
        hosts = planned_hosts(loaded.config, machine, os.environ)
    except ConfigError as error:
        refuse_input(error, output)
    is_this = assumed is None
    read = read_models if is_this else read_models_elsewhere
    models = read(loaded.config, fetch_part)
    resolved = resolve_on(loaded.config, hosts, os.environ, models)
    probes = probe_launch(resolved) if is_this else Probes()
    rules = kind_of(resolved).rules()
    report, measured = run_checks(resolved, loaded.origins, probes, rules=rules), ""
    if probe and (reason := _unmeasurable(resolved, report)):
        measured = f"no pair was measured: {reason}"
    elif probe:
        pair, transport = _measure(resolved)
        measured, probes = f"measured: {pair_line(pair)}", replace(probes, transport=(transport,))
        report = run_checks(resolved, loaded.origins, probes, rules=rules)
    print_report(replace(report, measured=measured), output, strict=strict, assumed=assumed)


def _unmeasurable(resolved: ResolvedLaunch, report: Report) -> str:
    """Return why the pairs of a launch cannot be measured here; empty if they can."""
    at_start, roles = "so only a start can measure pairs", resolved.roles.values()
    reasons = {
        "correct the errors first": report.errors,
        "there are no prefill and decode engines": not resolved.has_pair,
        f"kv_transfer.connector is {VLLM_NIXL}, {at_start}": resolved.config.kv_transfer.is_stock,
        f"the launch has several hosts, {at_start}": resolved.spans_hosts,
        f"the shape of the model is not known, {at_start}": not all(it.shape for it in roles),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def _measure(resolved: ResolvedLaunch) -> tuple[PairReady, PairTransport]:
    """Measure the first pair of ranks, each in its own process. Raises typer.Exit."""
    by_name = {engine.name: engine for engine in resolved.engines}
    prefill, decode = (by_name[f"{role}-0"] for role in PAIR)
    engines, transfer = prefill.engines, resolved.config.kv_transfer
    shape, layout = engines.shape, engines.footprint and engines.footprint.layout
    assert shape is not None
    options = {
        "num_blocks": [1],
        # A tensor of vLLM holds one layer.
        "num_layers": layout.num_layers_per_block if layout else 1,
        "num_kv_heads": num_kv_heads_of_rank(shape.num_kv_heads, engines.tp_size),
        "head_dim": shape.head_dim,
        "block_size": engines.settings.block_size,
        "dtype": engines.dtype or "bfloat16",
        "device": engines.device,
        "enable_cumem_allocator": engines.allocator == "cumem",
        "kv_transfer": transfer.model_dump(mode="json"),
    }
    # The ranks see only the GPUs of the pair: prefill uses the first, decode the last.
    listed = resolved.environ.get(VISIBLE_DEVICES)
    names = listed.split(",") if listed else [str(each.index) for each in resolved.machine.gpus]
    on_gpu = [it for it in (prefill, decode) if it.device_indices]
    used = [names[it.engines.gpus[it.device_indices[0]].index] for it in on_gpu]
    environ = {**resolved.environ, **engines.environment}
    if used:
        environ[VISIBLE_DEVICES] = ",".join(dict.fromkeys(used))
    said = run_module("pdlaunch.bench.transfer", json.dumps(options), environ=environ)
    pair = msgspec.json.decode(said, type=PairReady)
    return pair, transport_of(pair, prefill, decode)


def explain(
    code: str | None = typer.Argument(
        None, metavar="CODE", help="A rule such as PD204; without it, all rules are listed."
    ),
) -> None:
    """Show a rule, or list all of them."""
    rules, console = all_rules(), Console()
    if code is None:
        for rule in rules.values():
            console.print(Text(f"{rule.code} {rule.severity:<8}{rule.title}"))
    elif found := rules.get(code.upper()):
        head = f"{found.code} ({found.severity}, {family(found).lower()})"
        console.print(Text(head, style="bold"), Text(found.title), sep="\n")
        for heading, text in (("Why", found.why), ("Fix", found.fix), ("Source", found.source)):
            if text:
                console.print(Text(f"\n{heading}", style="bold"), Text(text), sep="\n")
    else:
        match = nearest(code.upper().replace("O", "0"), rules)  # no code has the letter
        hint = f"; did you mean {match}?" if match else "; `pdlaunch explain` lists all"
        print_errors([f"there is no rule {shown_name(code)}{hint}"])
        raise typer.Exit(EXIT_UNUSABLE)
