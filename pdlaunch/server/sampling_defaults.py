"""Reads the sampling defaults that a model brings in its generation_config.json, as vLLM does."""

from __future__ import annotations

import json
from pathlib import Path

from pdlaunch.errors import ConfigError, RequestError
from pdlaunch.protocol.openai.body import parse_request
from pdlaunch.protocol.openai.generation import SamplingDefaults

FILE_NAME = "generation_config.json"


def read_sampling_defaults(model_dir: str | Path) -> SamplingDefaults:
    """Return the model's defaults; neutral ones for what its file leaves open.

    Raises ConfigError when the file is broken or a value is out of range.
    """
    path = Path(model_dir) / FILE_NAME
    if not path.is_file():
        return SamplingDefaults()
    fix = f"Correct {FILE_NAME} of the model, or set generation_config: vllm."
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", field="model", fix=fix) from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds no JSON object", field="model", fix=fix)
    try:
        return parse_request(SamplingDefaults, settings, public=False)
    except RequestError as error:
        raise ConfigError(f"{path}: {error}", field="model", fix=fix) from None
