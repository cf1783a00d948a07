"""Defines what the rest of pdlaunch knows of one kind of engine.

Supervisor, commands and checks know kinds only through ``EngineKind``. ``native.NativeEngine``
and ``vllm.VllmEngine`` are the kinds, of which ``plan.kind_of`` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pdlaunch.checks import running_rules
from pdlaunch.checks.rule import Rule
from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.planning.roles import PlacedEngine
from pdlaunch.protocol.control import Capabilities

OF_RUNNING_ENGINES = frozenset(rule.code for rule in running_rules.RULES)
"""Rules on engines that run already: what they need is seen by `pdlaunch doctor` alone."""


class EngineKind(Protocol):
    """Knows one kind of engine. All engines of a launch are of one kind: kinds do not share KV
    blocks.
    """

    name: str
    """The word for the kind in settings."""

    def processes(self, engine: PlacedEngine) -> Sequence[ProcessSpec]:
        """Plan the processes of one engine on the hosts that it was placed on.

        One of them is a ``server`` with the engine's name: it registers the URL that the router
        uses, and says Ready, Drained and the like for an engine that cannot speak for itself.
        """

    def proves_pairs(self, process: ProcessSpec) -> bool:
        """Return True for a process of a decode engine that proves the path to a prefill engine.

        A launch is ready when all processes have said Ready and each of these has said PairReady
        for every prefill engine.
        """

    def capabilities(self, process: ProcessSpec, spec: EngineSpec | None) -> Capabilities:
        """Return what the server of an engine registers and the router reads.

        ``process``: the server; ``spec``: of a native engine, None of others.
        """

    def rules(self) -> Sequence[Rule]:
        """Return the rules of ``check-config`` that say something of such engines."""
