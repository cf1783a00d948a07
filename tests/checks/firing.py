"""Runs ``pdlaunch check-config`` on a set-up, in this process, with an environment of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pdlaunch.checks.context import PairTransport
from pdlaunch.cli import assume
from pdlaunch.cli import check_config as command
from pdlaunch.machine.facts import Machine
from pdlaunch.machine.machine_file import encode_machine
from tests.checks.contexts import CPU
from tests.command_line import invoke
from tests.config.model_files.files import EMPTY_SAFETENSORS, tiny_gguf

TINY: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "dtype": "float32",
}
QWEN = TINY | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 64}
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
MODELS: Mapping[str, dict[str, Any]] = {
    "tiny": TINY,
    "tiny-copy": TINY,
    "tiny-warm": TINY,
    "tiny-deep": TINY | {"num_hidden_layers": 4},
    "tiny-4-kv-heads": TINY | {"num_key_value_heads": 4},
    "tiny-12-heads": TINY
    | {
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "hidden_size": 192,
        "intermediate_size": 384,
    },
    "qwen": QWEN,
    "qwen-sliding": QWEN | {"use_sliding_window": True, "max_window_layers": 1},
    "gpt-oss": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "dtype": "bfloat16",
    },
    "llama-8b": LLAMA_8B,
    "llama-128k": LLAMA_8B | {"max_position_embeddings": 131072},
}
"""config.json of the models in the folder that the command runs in, by name."""

Arrange = Callable[[], AbstractContextManager[tuple[str, ...]]]


@contextlib.contextmanager
def as_it_is() -> Iterator[tuple[str, ...]]:
    yield ()


@dataclass(frozen=True)
class Setup:
    """A set-up as a user has it."""

    config: str = ""
    """The deployment's file, below the lines that name ``model`` and port 0."""
    flags: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    model: str = "tiny"
    machine: Machine | None = CPU
    """The machine that is assumed; None: this one, as it is probed."""
    machines: Mapping[str, Machine] = field(default_factory=dict)
    """Machines of other hosts, by the name of their file."""
    measured: tuple[PairTransport, ...] | None = None
    """What a launch of ``--probe`` would have measured."""
    arrange: Arrange = as_it_is
    """Prepares this machine for as long as the command runs, and gives further flags."""


@dataclass(frozen=True)
class Case:
    """A set-up in which a rule fires, and what becomes of it by the fixes on the rule's page."""

    code: str
    broken: Setup
    fixes: Mapping[str, Setup]
    """By the words of the page that say what to do."""
    only_on: str = ""
    """The hardware that alone shows the rule: what it measures is made up here."""


def write_models(folder: Path) -> None:
    """Write the models, ``tiny.gguf``, and ``no-weights`` and ``pickles``, which nobody reads."""
    for name, config in {**MODELS, "no-weights": TINY, "pickles": TINY}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "tiny-warm" / "generation_config.json").write_text('{"temperature": 0.6}')
    for name in MODELS:
        (folder / name / "model.safetensors").write_bytes(EMPTY_SAFETENSORS)
    (folder / "pickles" / "pytorch_model.bin").touch()
    tiny_gguf().write(folder / "tiny.gguf")


def found_by_check_config(setup: Setup, folder: Path) -> dict[str, str]:
    """Return the severity of each rule that the command names.

    It is ``not checked`` for those that could say nothing.
    """
    report = check_config(setup, folder)
    not_checked = {item["rule"]: "not checked" for item in report["resolved"]["not_checked"]}
    return not_checked | {item["rule"]: item["severity"] for item in report["findings"]}


def check_config(setup: Setup, folder: Path) -> dict[str, Any]:
    """Return what the command prints as JSON, run in the folder of the models."""
    (folder / "deploy.yaml").write_text(f"model: {setup.model}\nport: 0\n{setup.config}")
    for name, machine in setup.machines.items():
        (folder / name).write_text(encode_machine(machine, {}))
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environ = {"HOME": str(folder), **kept, **setup.environ}
    flags = ["--format", "json", *setup.flags]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(patch.dict(os.environ, environ, clear=True))
        if (measured := setup.measured) is not None:
            # Only this machine is measured, so this one must be the machine.
            this = setup.machine
            stack.enter_context(patch.object(assume, "probe_machine", lambda: this))
            stack.enter_context(patch.object(command, "ask_nixl", lambda launch: {}))
            stack.enter_context(patch.object(command, "probe_transport", lambda launch: measured))
            flags.append("--probe")
        elif setup.machine is not None:
            (folder / "machine.json").write_text(encode_machine(setup.machine, {}))
            flags += ["--assume", "machine.json"]
        flags += stack.enter_context(setup.arrange())
        arguments = ["check-config", "deploy.yaml", *flags]
        result = invoke(arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    report: dict[str, Any] = json.loads(result.stdout)
    assert all(re.fullmatch(r"PD\d{3}", item["rule"]) for item in report["findings"]), report
    return report
