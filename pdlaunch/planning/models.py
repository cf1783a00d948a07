"""Reads the models of a configuration, as far as that is possible before anything runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pdlaunch.config.model_files.download import Fetch
from pdlaunch.config.model_files.find import NotDownloadedError, is_on_hub, resolve_model
from pdlaunch.config.model_files.shape import (
    ModelShape,
    keeps_state,
    read_model_shape,
    read_outline,
)
from pdlaunch.config.model_files.weights import check_files, check_gguf
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES, Role
from pdlaunch.errors import ConfigError, UnsupportedModelError
from pdlaunch.planning.engine_choice import choose_engine


@dataclass(frozen=True, slots=True)
class Model:
    """Holds what is known of a model before anything runs: a shape, or why there is none."""

    name: str = ""  # the model as the user wrote it
    path: str | None = None  # the directory that is served
    shape: ModelShape | None = None
    error: ConfigError | None = None  # the reason why the model cannot be served
    # The reason why the shape is not known yet: the model is converted or downloaded first
    pending: str = ""
    # The reason why its shape is not known here, though another engine may serve it
    foreign: str = ""
    has_state: bool = False  # its layers keep a state in place of KV blocks, as Mamba does
    on_hub: bool = False  # its files come from a hub, the weights after everything has been judged
    # It is not on this machine, which judges for another one: nobody knows whether it serves
    elsewhere: bool = False


def read_models(config: LaunchConfig, fetch: Fetch | None = None) -> dict[Role, Model]:
    """Read the model of each role that has engines; never raises, see ``Model.error``.

    ``fetch`` brings the descriptions of models of a hub here first; without it, only what is here
    is read.
    """
    config = choose_engine(config, os.environ).config
    settings = {role: config.engine_settings(role) for role in ROLES if config.role(role).replicas}
    named = {
        role: (engine.model, engine.revision, engine.engine == "native")
        for role, engine in settings.items()
    }
    # Roles that name the same model share one read.
    read = {key: _read(*key, fetch) for key in dict.fromkeys(named.values())}
    return {role: read[key] for role, key in named.items()}


def fetch_weights(config: LaunchConfig, models: Mapping[Role, Model], fetch: Fetch) -> None:
    """Bring the weights of models of a hub here, those of the version that was judged.

    Raises ConfigError, also when what came is no usable set of weights.
    """
    wanted = {
        (model.path, model.name): model.shape
        for role, model in models.items()
        if model.on_hub and model.path and config.engine_settings(role).load_format != "dummy"
    }
    for (path, name), shape in wanted.items():
        commit = Path(path).name  # the name of a snapshot
        if shape is None or shape.is_outline:
            fetch(name, commit, "all")
        else:
            fetch(name, commit, "weights")
            check_files(Path(path), shape)


def read_models_elsewhere(config: LaunchConfig, fetch: Fetch | None = None) -> dict[Role, Model]:
    """Read the models of a launch on another machine, as far as they are here too."""
    return {role: _elsewhere(model) for role, model in read_models(config, fetch).items()}


def _elsewhere(model: Model) -> Model:
    # What is wrong with a model that was found is wrong everywhere.
    found = isinstance(model.error, UnsupportedModelError) or Path(model.name).expanduser().exists()
    if model.error is None or found:
        return model
    return replace(model, error=None, pending=f"{model.error}, on this machine", elsewhere=True)


def weight_error(model: Model) -> ConfigError | None:
    """Return what is wrong with the files of weights of a model that can be read; None: nothing."""
    # Those of a hub are fetched, and checked, once all else has been found good.
    if model.shape is None or model.shape.is_outline or model.path is None or model.on_hub:
        return None
    try:
        check_files(Path(model.path), model.shape)
    except ConfigError as error:
        return error
    return None


def _read(name: str, revision: str | None, is_native: bool, fetch: Fetch | None) -> Model:
    on_hub = is_on_hub(name)
    try:
        if on_hub and fetch is not None:
            fetch(name, revision, "description")
        resolved = resolve_model(name, revision)
        path = str(resolved.cache_dir)
        # Only the header is read: the launch converts the model before it starts anything.
        if not resolved.ready:
            check_gguf(resolved.source)
            return Model(name, path, pending=f"{name} is converted at the first start")
        return replace(
            _described(resolved.cache_dir, is_native), name=name, path=path, on_hub=on_hub
        )
    except NotDownloadedError as error:
        # Nobody tried to download it.
        if fetch is None:
            return Model(name, pending=f"{name} is downloaded at the first start", on_hub=True)
        return Model(name, error=error, on_hub=True)
    except ConfigError as error:
        return Model(name, error=error, on_hub=on_hub)
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        message = f"model {name!a} cannot be read: {reason}"
        return Model(name, error=ConfigError(message, field="model", value=name))


def _described(folder: Path, is_native: bool) -> Model:
    """Return the shape of a model, or why another engine alone may know it. Raises ConfigError."""
    try:
        return Model(shape=read_model_shape(folder))
    except UnsupportedModelError as error:
        if is_native:
            raise
        reason = f"native engines cannot serve it, so its shape is not known: {error}"
        outline = read_outline(folder)
        return Model(
            shape=outline, foreign="" if outline else reason, has_state=keeps_state(folder)
        )
