"""``pdlaunch verdict``: measure whether disaggregation pays for a load on this machine."""

import contextlib
import hashlib
import math
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import typer
import yaml
from rich.console import Console

from pdlaunch import __version__
from pdlaunch.api import resolve_here
from pdlaunch.bench.serve import FIRST_TOKEN_ID, TraceRequest, read_trace_file
from pdlaunch.bench.verdict.arms import Arm, config_to_measure, settings_of, usable_arms
from pdlaunch.bench.verdict.measure import Launches, Load
from pdlaunch.bench.verdict.search import Findings, Race
from pdlaunch.bench.verdict.verdict import Verdict, answer, find_verdict
from pdlaunch.cli import EXIT_INTERRUPTED
from pdlaunch.cli.bench import read_slo, refuse_given
from pdlaunch.cli.flags import refuse_address, with_serve_flags
from pdlaunch.cli.html_report import verdict_page
from pdlaunch.cli.output import (
    FormatOption,
    counted,
    ending_at_errors,
    print_errors,
    print_json,
    print_line,
    print_table,
    say,
)
from pdlaunch.config.http_names import is_loopback
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES
from pdlaunch.config.settings import SECRET_NAME, all_settings, flag_name, is_secret
from pdlaunch.config.sources import LoadedConfig, load_config
from pdlaunch.errors import ConfigError
from pdlaunch.machine.host import find_engine_command
from pdlaunch.planning.role_engines import RoleEngines

STATE, PAGE, WINNER = "verdict.json", "verdict.html", "winner.yaml"
# Settings that the verdict chooses for each arm
_CHOSEN = ("prefill.replicas", "decode.replicas", "both.replicas", "tensor_parallel_size")
_START_S = {"native on cpu": 8.0, "native on cuda": 30.0}  # seconds to start and stop an arm
_SLOW_START_S = 90.0  # for vLLM
_SINGLES_S = 15.0  # seconds to measure single engines
_PROBES_PER_VISIT = 5
_OVERTIME = 1.5  # the search ends after this multiple of the target time
_CREDENTIALS = re.compile(r"://[^/\s]+@")  # ``user:password@`` in a URL
_MIN_PROBE_S, _MAX_PROBE_S = 10.0, 60.0


class _State(msgspec.Struct):
    """The file that ``--resume`` reads."""

    question: str  # digest of load, goals, devices and settings; --resume compares it
    findings: Findings


@with_serve_flags
def verdict(
    config: Path | None = None,
    gpus: int | None = typer.Option(
        None, min=1, help="Devices to use: GPUs, or cores if engines run on the CPU (all)."
    ),
    slo: Any = typer.Option(
        ...,
        parser=read_slo,
        metavar="GOALS",
        help="Goals of a request, in ms: ttft=2000,itl=50 (ITL: p99 in a request); also tpot, e2e.",
    ),
    attainment: float = typer.Option(
        0.9, min=0.5, max=0.999, help="Share of the requests that must meet the goals."
    ),
    input_tokens: int | None = typer.Option(None, min=1, help="Prompt length (128)."),
    output_tokens: int | None = typer.Option(None, min=1, help="Output length (32)."),
    prefix: int | None = typer.Option(None, min=1, help="Length of the shared prefix (0)."),
    trace: Path | None = typer.Option(
        None,
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Take lengths, prefixes and bursts from a trace in Mooncake's format (JSON lines).",
    ),
    minutes: float = typer.Option(15.0, min=0.1, help="Target for the measuring time."),
    output: Path = typer.Option(
        Path("verdict"), metavar="FOLDER", file_okay=False, help="Folder for the results."
    ),
    resume: bool = typer.Option(False, "--resume", help="Continue measurements of the folder."),
    dry_run: bool = typer.Option(False, "--dry-run", help="List arms and minutes; start nothing."),
    seed: int = typer.Option(0, help="Seed of arrivals and prompts."),
    form: FormatOption = "table",
    *,
    flags: dict[str, object],
) -> None:
    """Measure which deployment serves a load best within its goals on this machine: aggregated
    replicas, or prefill and decode engines, and at which tensor parallel size.

    The candidates ("arms") take turns and get the same requests, to find the highest rate at which
    each arm meets the goals. Ctrl-C prints the verdict so far.
    """
    refuse_address(flags)
    refuse_given({flag_name(path): flags.get(path) for path in _CHOSEN}, "the verdict chooses it")
    if trace is not None:
        lengths = {"--input-tokens": input_tokens, "--output-tokens": output_tokens}
        refuse_given(lengths | {"--prefix": prefix}, "not with --trace, which has lengths")
    with ending_at_errors():
        loaded = load_config(config, os.environ, flags)
        engines, num_devices = _engines_here(loaded, gpus)
        on_cpu = engines.device == "cpu"
        arms, refused = usable_arms(loaded, num_devices, on_cpu=on_cpu)
        if len({arm.kind for arm in arms}) < 2:
            reasons = "".join(f"; {name}: {reason}" for name, reason in refused.items())
            why = "there is nothing to compare: a split needs two engines"
            raise ConfigError(f"{why}{reasons}", field="--gpus", value=num_devices, fix="use more")
        visit_s = 60 * minutes / (2 * min(len(arms), 4))
        least_probe_s = _MIN_PROBE_S * min(1.0, minutes)
        load = Load(
            **_requests(engines, input_tokens or 128, output_tokens or 32, prefix or 0, trace),
            seed=seed,
            probe_s=min(_MAX_PROBE_S, max(least_probe_s, visit_s / _PROBES_PER_VISIT)),
        )
        least_s = _least_s(arms, engines, load.probe_s)
        budget_s = max(60 * minutes, least_s)
        race = Race(arms, attainment, 60 * minutes, load.probe_s, _OVERTIME * budget_s)
        announce = print_line if dry_run else say
        announce(
            f"{counted(len(arms), 'arm')} for {counted(num_devices, 'device')}: "
            f"{', '.join(arm.name for arm in arms)}; about {budget_s / 60:.0f} min, "
            f"at least {least_s / 60:.0f}, at most about {race.limit_s / 60:.0f}"
        )
        for name, reason in refused.items():
            announce(f"ruled out: {name}: {reason}")
        left_out = ""
        if load.num_left_out:
            left_out = f" {counted(load.num_left_out, 'request')} of the trace: too long, not sent."
            announce(left_out.strip())
        if dry_run:
            return
        digest = _digest(load, slo, attainment, num_devices, engines)
        findings = _findings(output / STATE, digest, resume=resume)
        console, is_interrupted = Console(stderr=True), False

        def save(findings: Findings) -> None:
            _write(output / STATE, msgspec.json.encode(_State(digest, findings)).decode())

        save(findings)  # Find an unwritable folder now, not after minutes.
        launches = Launches(load, slo, attainment, loaded, on_cpu=on_cpu)
        with contextlib.ExitStack() as last:
            # Stop after the verdict is printed, since a second Ctrl-C may interrupt the stop.
            last.callback(launches.stop)
            try:
                with console.status("starting") as status:
                    show = status.update if console.is_terminal else say
                    find_verdict(race, findings, launches, save, show)
            except KeyboardInterrupt:
                print_errors([f"interrupted: --output {output} --resume continues"])
                is_interrupted = True
            found = answer(race, findings, refused)
            found = msgspec.structs.replace(found, note=found.note + left_out)
            _write(output / PAGE, verdict_page(found, findings, str(slo)))
            if found.winner is not None:
                arm = next(arm for arm in arms if arm.name == found.winner)
                text = serve_yaml(arm, loaded.config, on_cpu=on_cpu)
                _write(output / WINNER, text)
                notes = [line for line in text.splitlines()[1:] if line.startswith("# ")]
                for note in notes:
                    say(f"{WINNER}: {note[2:]}")
            _show(found, output, form)
    raise typer.Exit(EXIT_INTERRUPTED if is_interrupted else int(found.winner is None))


def _requests(
    engines: RoleEngines, input_tokens: int, output_tokens: int, prefix: int, trace: Path | None
) -> dict[str, Any]:
    """Return the fields of a ``Load`` for its requests. Raises ConfigError."""
    limit = engines.max_model_len or math.inf
    vocabulary = 30_000 if engines.shape is None else engines.shape.vocab_size
    token_ids = range(FIRST_TOKEN_ID, min(30_000, vocabulary))
    if prefix >= input_tokens:
        why = f"a prompt has {input_tokens} tokens"
        raise ConfigError(why, field="--prefix", value=prefix, fix="share fewer")
    same = TraceRequest(input_tokens - prefix, output_tokens, 0.0)
    found = [same] if trace is None else read_trace_file(trace)
    fitting = [each for each in found if prefix + each.input_length + each.output_length <= limit]
    if not fitting:
        why = f"every request is longer than max_model_len {limit}"
        field = "--input-tokens" if trace is None else "--trace"
        raise ConfigError(why, field=field, fix="ask for fewer tokens, or raise max_model_len")
    shared = random.Random(0).choices(token_ids, k=prefix)
    more = {"token_ids": token_ids, "num_left_out": len(found) - len(fitting)}
    return {"requests": fitting, "prefix": shared, **more}


def _digest(load: Load, slo: Any, attainment: float, num_devices: int, engines: RoleEngines) -> str:
    """Return a digest of all options that must not change at ``--resume``, unlike --minutes."""
    settings, _ = _without_secrets(engines.config.model_dump(mode="json", exclude_unset=True))
    command = engines.settings.engine_command
    version = find_engine_command(command, os.environ).version
    here = [__version__, engines.device, command, version, [gpu.name for gpu in engines.gpus]]
    same = msgspec.structs.replace(load, probe_s=0.0)
    asked = [same, slo, attainment, num_devices, settings, here]
    return hashlib.sha256(msgspec.json.encode(asked, enc_hook=repr)).hexdigest()


def _least_s(arms: Sequence[Arm], engines: RoleEngines, probe_s: float) -> float:
    """Estimate the seconds for single engines, and two visits of each arm with two probes."""
    kind = f"{engines.settings.engine} on {engines.device}"
    start_s = _START_S.get(kind, _SLOW_START_S)
    num_singles = sum(arm.num_both > 0 for arm in arms) + 1
    return num_singles * (start_s + _SINGLES_S) + 2 * len(arms) * (start_s + 2 * probe_s)


def serve_yaml(arm: Arm, config: LaunchConfig, *, on_cpu: bool) -> str:
    """Return the text of a file with which ``pdlaunch serve`` starts an arm, without secrets."""
    given = settings_of(arm, config, on_cpu=on_cpu, mode="json")
    kept, secrets = _without_secrets(given)
    lines = [f"# {arm.name}, by pdlaunch verdict", *(f"# left out: {path}" for path in secrets)]
    if {"api_key", "api_keys"} & {*secrets} and not is_loopback(config.host):
        lines.append(f"# other hosts can reach {config.host}: set the API key again")
    return "\n".join([*lines, yaml.safe_dump(kept, sort_keys=False)])


def _without_secrets(values: Any, section: str = "") -> tuple[Any, list[str]]:
    """Return values without secrets (at any depth), and the paths of the secrets."""
    if not isinstance(values, dict | list):
        return values, []
    kept: dict[Any, Any] = {}
    secrets: list[str] = []
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        path = f"{section}{name}"
        if _holds_secret(path, value):
            secrets.append(path)
        else:
            kept[name], more = _without_secrets(value, f"{path}.")
            secrets += more
    return kept if isinstance(values, dict) else list(kept.values()), secrets


def _holds_secret(path: str, value: object) -> bool:
    if value is None or isinstance(value, bool):
        return False
    if isinstance(value, str) and value.startswith(("{", "[")):
        with contextlib.suppress(msgspec.DecodeError):  # an argument in JSON
            return bool(_without_secrets(msgspec.json.decode(value))[1])
    if path in all_settings():
        named = is_secret(path)
    else:
        name = path.rpartition(".")[2]
        is_count = str(value).isdigit() and "token" in name.lower()
        named = not is_count and SECRET_NAME.search(name) is not None
    return named or (isinstance(value, str) and _CREDENTIALS.search(value) is not None)


def _engines_here(loaded: LoadedConfig, gpus: int | None) -> tuple[RoleEngines, int]:
    """Return the engines of one arm, with the facts of all arms, and the number of devices."""
    placement = loaded.config.placement
    if placement != "local":
        why = "verdict measures only this machine"
        raise ConfigError(why, field="placement", value=placement, fix="leave it out")
    for role in ROLES:
        for name in ("data_parallel_size", "nnodes", "pipeline_parallel_size"):
            if (value := getattr(loaded.config.engine_settings(role), name)) > 1:
                why = "arms differ only in replicas and tensor_parallel_size"
                raise ConfigError(why, field=name, value=value, fix="leave it out")
    alone = config_to_measure(Arm(1, num_both=1), loaded, on_cpu=False)
    engines = next(iter(resolve_here(alone).roles.values()))
    num_here = engines.machine.num_cpus if engines.device == "cpu" else len(engines.gpus)
    if (gpus or 0) > num_here:
        why = f"this machine has {counted(num_here, 'core' if engines.device == 'cpu' else 'GPU')}"
        raise ConfigError(why, field="--gpus", value=gpus, fix="ask for fewer")
    return engines, gpus or num_here


def _findings(path: Path, digest: str, *, resume: bool) -> Findings:
    if not resume and not path.exists():
        return Findings()
    try:
        state = msgspec.json.decode(path.read_bytes(), type=_State)
        if not resume:
            if not (state.findings.figures or state.findings.probes):
                return Findings()  # the first arm did not start
            raise ConfigError(
                f"{path} holds measurements", field="--output", fix="add --resume, or name another"
            )
        if state.question == digest:
            # Try arms again that did not start before.
            state.findings.broken.clear()
            return state.findings
        problem = "is about another load, other goals, devices or settings"
    except (OSError, msgspec.MsgspecError) as error:
        problem = f"cannot be read: {error}"
    fix = "give the same options again, or another --output"
    raise ConfigError(f"{path} {problem}", field="--resume" if resume else "--output", fix=fix)


def _write(path: Path, text: str) -> None:
    """Replace a file atomically, so that a killed verdict can be resumed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.touch(mode=0o600)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", field="--output") from None


def _show(found: Verdict, folder: Path, form: str) -> None:
    if form == "json":
        print_json(found)
        return
    print_line(found.text)
    if found.rows:
        print_table(found.rows, {name: name.replace("_", "\n") for name in found.rows[0]})
    for name, reason in found.ruled_out.items():
        print_line(f"not measured: {name}: {reason}")
    print_line(found.note)
    files = PAGE if found.winner is None else f"{PAGE}, and {WINNER} for `pdlaunch serve`"
    print_line(f"In {folder}: {files}. Times in ms.")
