"""Replaces ``engine: auto`` (vLLM if it is installed, else native engines), and reads the models of
a configuration before any process starts.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pdlaunch.config.model_files.download import Fetch
from pdlaunch.config.model_files.find import ALIASES, NotDownloadedError, is_on_hub, resolve_model
from pdlaunch.config.model_files.shape import (
    ModelShape,
    keeps_state,
    read_model_shape,
    read_outline,
)
from pdlaunch.config.model_files.weights import check_files, check_gguf
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import HOW_TO_GET_VLLM, ROLES, EngineName, Role
from pdlaunch.errors import ConfigError, UnsupportedModelError


class EngineChoice(NamedTuple):
    """Holds the settings with ``auto`` replaced, and the reason (empty if nothing was ``auto``)."""

    config: LaunchConfig
    reason: str


def choose_engine(config: LaunchConfig, environ: Mapping[str, str]) -> EngineChoice:
    """Replace ``auto`` by a kind of engine, and a command that is not on PATH by its path."""
    auto = [role for role in ROLES if getattr(config.role(role), "engine", None) == "auto"]
    path = _find_beside_python(config.engine_command, environ)
    command = {} if path is None else {"engine_command": path}
    if config.engine != "auto" and not auto:
        uses_command = config.engine == "vllm" and command
        return EngineChoice(config.model_copy(update=command) if uses_command else config, "")
    name, reason = _choose(config, path or shutil.which(config.engine_command, path=_path(environ)))
    changed: dict[str, object] = {
        role: config.role(role).model_copy(update={"engine": name}) for role in auto
    }
    if config.engine == "auto":
        changed["engine"] = name
    if name == "vllm":
        changed |= command
    return EngineChoice(config.model_copy(update=changed), f"{name}, because {reason}")


def _choose(config: LaunchConfig, path: str | None) -> tuple[EngineName, str]:
    others = "native engines: --engine native"
    for_vllm = [
        name for name in ("engine_command", "engine_args") if name in config.model_fields_set
    ]
    if for_vllm:
        return "vllm", f"{for_vllm[0]} is set; {others}"
    if config.model in ALIASES:
        found = "--engine vllm" if path else HOW_TO_GET_VLLM
        return "native", f"{config.model} is the demo model; vLLM: {found}"
    if path is None:
        return "native", f"no {config.engine_command} was found; vLLM: {HOW_TO_GET_VLLM}"
    return "vllm", f"{path} is installed; {others}"


def _find_beside_python(command: str, environ: Mapping[str, str]) -> str | None:
    """Return the path of a command in the active environment; None if on PATH, or not found."""
    if os.sep in command or shutil.which(command, path=_path(environ)):
        return None
    # Do not resolve links: the python of a virtual environment links to a folder outside of it.
    active = [environ[name] for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if environ.get(name)]
    folders = [Path(sys.executable).parent, *(Path(folder, "bin") for folder in active)]
    return shutil.which(command, path=os.pathsep.join(map(str, folders)))


def _path(environ: Mapping[str, str]) -> str:
    return environ.get("PATH", os.defpath)


@dataclass(frozen=True, slots=True)
class Model:
    """Describes a model before the launch: its shape, or the reason why it has none."""

    name: str = ""  # the model as the user wrote it
    path: str | None = None  # the directory to serve
    shape: ModelShape | None = None
    error: ConfigError | None = None  # the reason why the model cannot be served
    # The reason why the shape is not known yet: the model has to be converted or downloaded
    pending: str = ""
    # The reason why the shape is not known, for a model that only vLLM may be able to serve
    foreign: str = ""
    has_state: bool = False  # some layers keep a state instead of KV blocks, as Mamba does
    on_hub: bool = False  # the files come from the hub; weights are downloaded after all checks
    # The checks are for another machine, and this machine does not have the model
    elsewhere: bool = False


def read_models(config: LaunchConfig, fetch: Fetch | None = None) -> dict[Role, Model]:
    """Read the model of each role with engines; ``fetch`` gets descriptions from the hub first.
    Errors are in ``Model.error``, never raised.
    """
    config = choose_engine(config, os.environ).config
    settings = {role: config.engine_settings(role) for role in ROLES if config.role(role).replicas}
    named = {
        role: (engine.model, engine.revision, engine.engine == "native")
        for role, engine in settings.items()
    }
    # Read a model once if several roles use it.
    read = {key: _read(*key, fetch) for key in dict.fromkeys(named.values())}
    return {role: read[key] for role, key in named.items()}


def fetch_weights(config: LaunchConfig, models: Mapping[Role, Model], fetch: Fetch) -> None:
    """Download the weights of models on the hub, of the same commit as their description. Raises
    ConfigError, also if the weights are damaged or incomplete.
    """
    wanted = {
        (model.path, model.name): model.shape
        for role, model in models.items()
        if model.on_hub and model.path and config.engine_settings(role).load_format != "dummy"
    }
    for (path, name), shape in wanted.items():
        commit = Path(path).name  # the cache names a snapshot's folder by its commit
        fetch(name, commit, "all" if shape is None or shape.is_outline else "weights")
        check_files(Path(path), shape)


def read_models_elsewhere(config: LaunchConfig, fetch: Fetch | None = None) -> dict[Role, Model]:
    """Read the models for a launch on another machine; this machine may lack some of them."""
    models = read_models(config, fetch)
    for role, model in models.items():
        # Keep the error of a model that this machine has: it is the same on all machines.
        is_here = Path(model.name).expanduser().exists()
        if model.error and not (is_here or isinstance(model.error, UnsupportedModelError)):
            pending = f"{model.error}, on this machine"
            models[role] = replace(model, error=None, pending=pending, elsewhere=True)
    return models


def weight_error(model: Model) -> ConfigError | None:
    """Return the error in the files of a model that is here, or None."""
    # Weights from the hub are downloaded and checked after all other checks have passed.
    if model.path is None or model.pending or model.on_hub:
        return None
    try:
        check_files(Path(model.path), model.shape)
    except ConfigError as error:
        return error
    return None


def _read(name: str, revision: str | None, is_native: bool, fetch: Fetch | None) -> Model:
    on_hub, weight_bytes = is_on_hub(name), None
    try:
        if on_hub and fetch is not None:
            weight_bytes = fetch(name, revision, "description")
        resolved = resolve_model(name, revision)
        path = str(resolved.cache_dir)
        # Check only the start of the file: the launch converts the model before it starts engines.
        if not resolved.ready:
            check_gguf(resolved.source)
            return Model(name, path, pending=f"{name} is converted at the first start")
        described = _described(resolved.cache_dir, is_native, weight_bytes)
        return replace(described, name=name, path=path, on_hub=on_hub)
    except NotDownloadedError as error:
        # Without ``fetch`` nothing was downloaded, so a missing model is not an error.
        if fetch is None:
            return Model(name, pending=f"{name} is downloaded at the first start", on_hub=True)
        return Model(name, error=error, on_hub=True)
    except ConfigError as error:
        return Model(name, error=error, on_hub=on_hub)
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        message = f"model {name!a} cannot be read: {reason}"
        return Model(name, error=ConfigError(message, field="model", value=name))


def _described(folder: Path, is_native: bool, weight_bytes: int | None) -> Model:
    """Return a model with its shape, or the reason why it has none. Raises ConfigError."""
    try:
        return Model(shape=read_model_shape(folder))
    except UnsupportedModelError as error:
        if is_native:
            raise
        reason = f"native engines cannot serve it, so its shape is not known: {error}"
        outline = read_outline(folder, weight_bytes)
        return Model(
            shape=outline, foreign="" if outline else reason, has_state=keeps_state(folder)
        )
