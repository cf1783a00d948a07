"""``pdlaunch check-config``: find what is wrong with a set-up before it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pdlaunch.checks.probed import Probes
from pdlaunch.checks.probes import probe_files, probe_ports
from pdlaunch.checks.run import run_checks
from pdlaunch.cli.findings import OutputOption, StrictOption, print_report, refuse_input
from pdlaunch.cli.flags import with_serve_flags
from pdlaunch.cli.machines import AssumeOption, judged_machine
from pdlaunch.cli.preflight import load_launch
from pdlaunch.config.model_files.download import fetch_part
from pdlaunch.errors import ConfigError
from pdlaunch.launch.engines.plan import kind_of
from pdlaunch.planning.hosts import planned_hosts
from pdlaunch.planning.models import read_models, read_models_elsewhere
from pdlaunch.planning.resolve import resolve_on


@with_serve_flags
def check_config(
    config: Path | None = None,
    output: OutputOption = "table",
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
        judged = judged_machine(assume, loaded.config)
        hosts = planned_hosts(loaded.config, judged.machine, judged.environ)
    except ConfigError as error:
        refuse_input(error, output, config)
    is_this = judged.assumed is None
    read = read_models if is_this else read_models_elsewhere
    models = read(loaded.config, fetch_part)
    resolved = resolve_on(loaded.config, hosts, judged.environ, models)
    probes = Probes()
    if is_this:
        probes = replace(probe_files(resolved), ports=probe_ports(resolved))
    report = run_checks(resolved, loaded.origins, probes, rules=kind_of(resolved).rules())
    print_report(report, output, strict=strict, assumed=judged.assumed, path=config)
