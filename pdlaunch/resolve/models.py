"""Reads the models of a configuration, as far as that is possible before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from pdlaunch.config.model_files.aliases import resolve_model
from pdlaunch.config.model_files.gguf import check_gguf
from pdlaunch.config.model_files.shape import ModelShape, read_model_shape
from pdlaunch.config.model_files.weights import weight_files
from pdlaunch.config.models import LaunchConfig, Role
from pdlaunch.errors import ConfigError

ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Model:
    """Holds what is known of a model before anything runs: a shape, or why there is none."""

    name: str = ""
    """The model as the user wrote it."""
    path: str | None = None
    """The directory that is served."""
    shape: ModelShape | None = None
    error: ConfigError | None = None
    """The reason why the model cannot be served."""
    pending: str = ""
    """The reason why the shape is not known yet: the model is converted first."""


def read_models(config: LaunchConfig) -> dict[Role, Model]:
    """Read the model of each role that has engines; never raises, see ``Model.error``."""
    names = {
        role: config.engine_settings(role).model for role in ROLES if config.role(role).replicas
    }
    read = {name: _read(name) for name in set(names.values())}
    return {role: read[name] for role, name in names.items()}


def read_models_elsewhere(config: LaunchConfig) -> dict[Role, Model]:
    """Read the models of a launch on another machine, as far as they are here too."""
    return {role: _elsewhere(model) for role, model in read_models(config).items()}


def _elsewhere(model: Model) -> Model:
    """Return a model that this machine does not have as one whose shape is not known."""
    if model.error is None or Path(model.name).expanduser().exists():
        return model
    return replace(model, error=None, pending=f"{model.error}, on this machine")


def weight_error(model: Model) -> ConfigError | None:
    """Return what is wrong with the files of weights of a model that can be read; None: nothing."""
    if model.shape is None or model.path is None:
        return None
    try:
        weight_files(Path(model.path))
    except ConfigError as error:
        return error
    return None


def _read(name: str) -> Model:
    try:
        resolved = resolve_model(name)
        path = str(resolved.cache_dir)
        if not resolved.ready:
            check_gguf(resolved.source)
            return Model(name, path, pending=f"{name} is converted at the first start")
        return Model(name, path, read_model_shape(resolved.cache_dir))
    except ConfigError as error:
        return Model(name, error=error)
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        message = f"model {name!a} cannot be read: {reason}"
        return Model(name, error=ConfigError(message, field="model", value=name))
