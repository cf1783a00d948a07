"""``pdlaunch check-config`` finds what is wrong with a set-up before it runs; ``pdlaunch explain``
shows why a rule exists, and how to fix its findings.
"""

from __future__ import annotations

import os
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.checks.probed import Probes, probe_launch
from pdlaunch.checks.run import all_rules, family, run_checks
from pdlaunch.cli import EXIT_UNUSABLE
from pdlaunch.cli.findings import StrictOption, print_report, refuse_input
from pdlaunch.cli.flags import with_serve_flags
from pdlaunch.cli.output import FormatOption, print_errors
from pdlaunch.cli.preflight import AssumeOption, judged_machine, load_launch
from pdlaunch.config.model_files.download import fetch_part
from pdlaunch.config.problems import nearest, shown_name
from pdlaunch.errors import ConfigError
from pdlaunch.launch.engines.plan import kind_of
from pdlaunch.planning.hosts import planned_hosts
from pdlaunch.planning.models import read_models, read_models_elsewhere
from pdlaunch.planning.resolve import resolve_on


@with_serve_flags
def check_config(
    config: Path | None = None,
    output: FormatOption = "table",
    strict: StrictOption = False,
    assume: AssumeOption = None,
    *,
    flags: dict[str, object],
) -> None:
    """Find what would break a deployment, on this machine or on another one, without starting it.

    Rules that lack a fact are listed as not checked; `pdlaunch explain CODE` says what a rule is
    about.
    """
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
    report = run_checks(resolved, loaded.origins, probes, rules=kind_of(resolved).rules())
    print_report(report, output, strict=strict, assumed=assumed)


def explain(
    code: str | None = typer.Argument(
        None, metavar="CODE", help="A rule such as PD204; all are listed without it."
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
