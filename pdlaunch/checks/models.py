"""The models of a configuration, as far as they can be read before anything runs."""

from __future__ import annotations

from pdlaunch.checks.context import ROLES, Model
from pdlaunch.config.aliases import resolve_model
from pdlaunch.config.gguf_file import check_gguf
from pdlaunch.config.model_shape import read_model_shape
from pdlaunch.config.models import LaunchConfig, Role
from pdlaunch.config.weight_files import weight_files
from pdlaunch.errors import ConfigError


def read_models(config: LaunchConfig) -> dict[Role, Model]:
    """The model of each role; never raises, an unusable model says so itself."""
    names = {role: config.engine_settings(role).model for role in ROLES}
    read = {name: _read(name) for name in set(names.values())}
    return {role: read[name] for role, name in names.items()}


def read_weight_errors(config: LaunchConfig) -> dict[Role, ConfigError]:
    """By role, what is wrong with the weights that its engines will read; models that are converted
    first have none yet.
    """
    errors: dict[Role, ConfigError] = {}
    for role in ROLES:
        settings = config.engine_settings(role)
        if settings.load_format == "dummy":
            continue
        try:
            resolved = resolve_model(settings.model)
        except (ConfigError, OSError, RuntimeError, ValueError):
            # ``read_models`` says it.
            continue
        try:
            if resolved.ready:
                weight_files(resolved.cache_dir)
        except ConfigError as error:
            errors[role] = error
    return errors


def _read(name: str) -> Model:
    try:
        resolved = resolve_model(name)
        if not resolved.ready:
            check_gguf(resolved.source)
            return Model(str(resolved.cache_dir), pending=f"{name} is converted at the first start")
        return Model(str(resolved.cache_dir), read_model_shape(resolved.cache_dir))
    except ConfigError as error:
        return Model(error=error)
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Model(
            error=ConfigError(f"model {name!a} cannot be read: {reason}", field="model", value=name)
        )
