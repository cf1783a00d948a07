"""``pdlaunch render``: write a deployment for Kubernetes."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
import yaml

from pdlaunch import __version__
from pdlaunch.checks.probed import Probes
from pdlaunch.cli.flags import ServeCommand, with_serve_flags
from pdlaunch.cli.output import ending_at_errors
from pdlaunch.cli.preflight import (
    AssumeOption,
    judged_machine,
    refuse_errors,
    refuse_running_engines,
)
from pdlaunch.config.model_files.download import fetch_part
from pdlaunch.config.sources import load_config
from pdlaunch.errors import ConfigError
from pdlaunch.launch.render import manifests
from pdlaunch.planning.models import read_models, read_models_elsewhere
from pdlaunch.planning.plan import ResolvedHost, planned_hosts
from pdlaunch.planning.resolve import ResolvedLaunch, resolve_on

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
# Stands for the addresses of pods, which are not known yet (RFC 5737)
_PLACEHOLDER_ADDRESS = "192.0.2.1"

app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})


@app.command("kubernetes", cls=ServeCommand, short_help="Print objects for kubectl apply.")
@with_serve_flags
def kubernetes(
    config: Path | None = None,
    name: str = typer.Option(
        "pdlaunch", "--name", help="Name of the objects: small letters, digits and dashes."
    ),
    namespace: str | None = typer.Option(None, "--namespace", help="Namespace of the objects."),
    image: str | None = typer.Option(None, "--image", help="Image of all containers."),
    gpu_resource: str = typer.Option(
        "nvidia.com/gpu", "--gpu-resource", help="Resource for GPUs; a rank gets one."
    ),
    rdma_resource: str | None = typer.Option(
        None, "--rdma-resource", help="Resource for RDMA, such as rdma/hca; an engine pod gets one."
    ),
    volume: list[str] | None = typer.Option(
        None,
        "--volume",
        metavar="SOURCE:/FOLDER",
        help="Mount a PersistentVolumeClaim, for models.",
    ),
    cache_claim: str | None = typer.Option(
        None,
        "--cache-claim",
        help="PersistentVolumeClaim for models (ReadWriteMany); by default, render one.",
    ),
    cache_size: str = typer.Option("20Gi", "--cache-size", help="Size of the rendered claim."),
    leader_worker_set: bool = typer.Option(
        False, "--leader-worker-set", help="Render engines over several hosts as LeaderWorkerSets."
    ),
    exclusive_topology: str = typer.Option(
        "",
        "--exclusive-topology",
        metavar="LABEL",
        help="Node label, such as the rack's: a LeaderWorkerSet gives each engine its own value.",
    ),
    print_secret: bool = typer.Option(
        False, "--print-secret", help="Print only the Secret, with new join keys."
    ),
    assume: AssumeOption = None,
    *,
    flags: dict[str, object],
) -> None:
    """Print objects for `kubectl apply -f -`: a pod with supervisor and router, engine pods.

    Print the Secret that they refer to with --print-secret.
    """
    with ending_at_errors():
        if namespace is not None:
            _require_name(namespace, "--namespace")
        options = manifests.PodOptions(
            name=_require_name(name, "--name"),
            image=image or f"pdlaunch:{__version__}",
            gpu_resource=gpu_resource,
            rdma_resource=rdma_resource,
            claims=_volumes(volume or ()),
            cache_claim=cache_claim,
            cache_size=cache_size,
            leader_worker_set=leader_worker_set,
            exclusive_topology=exclusive_topology,
        )
        launch = _placed(config, flags, options, assume)
        if print_secret:
            objects = [manifests.kubernetes_secret(launch, namespace)]
        else:
            objects = manifests.kubernetes_objects(launch, namespace)
        sys.stdout.write(_to_yaml(objects))


def _placed(
    path: Path | None,
    flags: Mapping[str, object],
    options: manifests.PodOptions,
    assume: str | None,
) -> manifests.PodLaunch:
    """Return the launch with its pods. Raises ConfigError, or typer.Exit if a rule fails."""
    loaded = load_config(path, os.environ, dict(flags))
    refuse_running_engines(loaded.config)
    machines = manifests.machine_names(options, loaded.config)
    placed = manifests.place(loaded.config, machines)
    config = placed.config()
    machine, assumed = judged_machine(assume, config)
    pod = ResolvedHost("", machine, os.environ, _PLACEHOLDER_ADDRESS, _PLACEHOLDER_ADDRESS)
    pods = {name: replace(pod, name=name) for group in machines.values() for name in group}
    hosts = planned_hosts(config, machine, os.environ, pods)
    read = read_models if assumed is None else read_models_elsewhere
    resolved = resolve_on(config, hosts, os.environ, read(config, fetch_part))
    # A launch that cannot start here cannot start on pods either.
    resolved.require_startable()
    refuse_errors(resolved, loaded.origins, Probes(), undone="not rendered")
    _require_mounted(resolved, options)
    # Write the engine that `auto` chose here: pods may have other executables.
    settings = _to_yaml([{**placed.settings, "engine": resolved.config.engine}])
    return manifests.PodLaunch(options, placed, resolved, machines, settings)


def _require_mounted(resolved: ResolvedLaunch, options: manifests.PodOptions) -> None:
    """Raise ConfigError for a model in a folder that no volume mounts into pods."""
    folders = [Path(folder) for folder in options.claims]
    for engines in resolved.roles.values():
        model = Path(engines.settings.model).expanduser()
        is_path = model.is_absolute() or engines.settings.model.startswith((".", "~"))
        if is_path and not any(model.is_relative_to(folder) for folder in folders):
            why, where = "the model is in a folder that no pod has", engines.where("model")
            fix = f"mount it with --volume SOURCE:{model.parent}, or name a model of a hub"
            raise ConfigError(why, field=where, value=str(model), fix=fix)


def _require_name(name: str, field: str) -> str:
    if not _NAME.fullmatch(name):
        form = "1 to 40 small letters, digits and dashes that begins with a letter"
        why = f"{name[:80]!a} is not a name of {form}"
        raise ConfigError(why, field=field, value=name, fix=f"{field} my-launch")
    return name


def _volumes(given: Sequence[str]) -> dict[str, str]:
    """Return mount folder -> source. Raises ConfigError."""
    found: dict[str, str] = {}
    for text in given:
        source, _, folder = text.partition(":")
        if not source or not folder.startswith("/") or folder in found:
            why = f"{text[:80]!a} does not name a source and another folder than earlier volumes"
            fix = "--volume models:/models"
            raise ConfigError(why, field="--volume", value=text, fix=fix)
        found[folder] = source
    return found


class _Dumper(yaml.SafeDumper):
    """Writes YAML without aliases, and texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _write_text)


def _to_yaml(documents: Sequence[Any]) -> str:
    return yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, width=100, explicit_start=len(documents) > 1
    )
