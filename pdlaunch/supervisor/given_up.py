"""Engines that died too often to be started again."""

from __future__ import annotations

from pdlaunch.config.models import Role
from pdlaunch.supervisor.instance import Instance
from pdlaunch.supervisor.plan import ROLES, Plan


class GivenUp:
    """Which engines of a launch are given up, and why; ``in`` asks for an engine."""

    def __init__(self, plan: Plan) -> None:
        self._engines = {role: plan.engines(role) for role in ROLES}
        self._why: dict[str, str] = {}

    def __contains__(self, engine: str) -> bool:
        return engine in self._why

    def add(self, cause: Instance, summary: str) -> None:
        """``cause``: the process whose deaths were too many."""
        self._why[cause.spec.engine] = summary + (f": {cause.error}" if cause.error else "")

    def left_of(self, role: Role | None) -> list[str]:
        """The other engines of a role; the router has none."""
        return [] if role is None else [engine for engine in self._engines[role] if engine not in self._why]

    def details(self, last: Instance) -> list[str]:
        """For the report of a launch whose ``last`` engine of a role is gone: what became of the others."""
        role = last.spec.role
        others = [engine for engine in self._engines[role] if engine != last.spec.engine] if role is not None else []
        return [f"  before that, {self._why[engine]}" for engine in others]
