"""The facts about this machine that planning needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Machine:
    """What ranks are placed on. Planning is a pure function of this and the configuration."""

    cpus: tuple[int, ...]
    """Cores that this process may use."""
    num_gpus: int = 0
    """CUDA devices that are visible."""
    has_native_bf16: bool = False
    """The CPU multiplies bfloat16 by itself (avx512_bf16 or amx_bf16); emulated it is six times slower in prefill."""
    environ: Mapping[str, str] = field(default_factory=dict)


def read_machine(environ: Mapping[str, str]) -> Machine:
    """This machine."""
    return Machine(cpus=tuple(sorted(os.sched_getaffinity(0))), environ=environ)
