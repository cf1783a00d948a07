"""Decides whether engines of vLLM prove the blocks that they pull, with the connector of
``pdlaunch.vllm``.
"""

from __future__ import annotations

from collections.abc import Mapping

from pdlaunch.config.engine_settings import EngineSettings
from pdlaunch.config.model_files.shape import HYBRID
from pdlaunch.config.vllm_arguments import long_name
from pdlaunch.platform.engine_commands import find_engine_command
from pdlaunch.resolve.models import Model
from pdlaunch.vllm.support import SUPPORTED_VERSIONS, is_supported

_SPLITTING = (
    "decode-context-parallel-size",
    "speculative-config",
)
"""Arguments of vLLM with which an engine keeps KV in a way that the connector refuses."""


def unverified_because(settings: EngineSettings, environ: Mapping[str, str], model: Model) -> str:
    """Return why an engine of vLLM uses pulled blocks unproven; empty: it proves them."""
    version = find_engine_command(settings.engine_command, environ).version
    if version is None:
        return f"the version of {settings.engine_command} is not known"
    if not is_supported(version):
        return f"it is vLLM {version}, and {', '.join(SUPPORTED_VERSIONS)} can be verified"
    if model.error is not None:
        return "the layers of the model are not known"
    if model.unproven:
        return model.unproven
    if model.shape is not None and any(window is not None for window in model.shape.layer_windows):
        return HYBRID
    for name in settings.engine_args:
        if long_name(name) in _SPLITTING:
            return f"engine_args has {name}"
    return ""
