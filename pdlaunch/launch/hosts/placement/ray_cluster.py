"""Places the engines of a launch on a Ray cluster, with a bundle and an agent for each host.

::

    placement group   bundle 0 (prefill-0)   bundle 1 (decode-0)   ..    PACK or SPREAD over nodes
    actor             holds its CPUs, GPUs; runs `pdlaunch agent`  ..
    a node is lost    Ray places the bundle and the actor elsewhere; a thread of the supervisor
                      starts the agent again, which joins with the same name
"""

import contextlib
import importlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pdlaunch.config.hosts import HostSettings
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES, Role
from pdlaunch.errors import ConfigError, StartupError
from pdlaunch.launch.hosts.join import JoinTicket, new_keys
from pdlaunch.launch.hosts.local import HIDDEN_VARIABLES

logger = logging.getLogger(__name__)

POLL_S = 1.0
_ANSWER_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 20.0
_NOTE_AFTER_S = 5.0  # Ray places a group within a second if it has room


@dataclass(frozen=True, slots=True)
class Bundle:
    name: str  # the host's name in the launch: ``ray-prefill-0``
    role: Role
    num_cpus: int
    num_gpus: int
    executables: tuple[str, ...] = ()  # programs of engines that the agent allows

    def __str__(self) -> str:
        parts = ", ".join(f"{kind} {number:g}" for kind, number in self.resources.items())
        return f"{self.name} ({parts})"

    @property
    def resources(self) -> dict[str, float]:
        gpus = {"GPU": float(self.num_gpus)} if self.num_gpus else {}
        return {"CPU": float(self.num_cpus)} | gpus


class AgentActor:
    """Holds the resources of a bundle and runs an agent; only public keys pass through Ray."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._keys = new_keys()
        self._agent: subprocess.Popen[bytes] | None = None

    def state(self) -> tuple[str, bool]:
        """Return the public key, new if the actor was restarted, and whether the agent runs."""
        return self._keys.public, self._agent is not None and self._agent.poll() is None

    def start(self, endpoint: str, server_public: str) -> None:
        """Start the agent. It ends when its standard input closes, and so with this actor."""
        self.stop()
        name, cpus = self._bundle.name, str(self._bundle.num_cpus)
        command = [sys.executable, "-P", "-m", "pdlaunch", "agent", "--join", "-"]
        command += ["--name", name, "--cpus", cpus, "--stop-on-stdin-eof"]
        command += [f"--allow-executable={each}" for each in self._bundle.executables]
        self._agent = subprocess.Popen(command, stdin=subprocess.PIPE)
        ticket = JoinTicket(endpoint=endpoint, server_public=server_public, keys=self._keys)
        assert self._agent.stdin is not None
        self._agent.stdin.write(msgspec.json.encode(ticket) + b"\n")
        self._agent.stdin.flush()

    def stop(self) -> None:
        if self._agent is None:
            return
        assert self._agent.stdin is not None
        with contextlib.suppress(OSError):
            self._agent.stdin.close()
        try:
            self._agent.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._agent.kill()
            self._agent.wait()
        self._agent = None


def ray_bundles(config: LaunchConfig, *, has_gpus: bool = False) -> tuple[Bundle, ...]:
    """Return a bundle for each host of each engine: per rank a GPU and a core, or on a CPU a core
    for each thread. ``has_gpus``: engines with device ``auto`` run on GPUs.
    """
    bundles: list[Bundle] = []
    for role in ROLES:
        settings = config.engine_settings(role)
        on_cpu = settings.device == "cpu" or (settings.device == "auto" and not has_gpus)
        num_ranks = settings.ranks_per_node
        threads = (settings.num_threads or 1) if on_cpu else 1
        num_cpus, num_gpus = num_ranks * threads, 0 if on_cpu else num_ranks
        bundles += [
            Bundle(f"ray-{role}-{index}", role, num_cpus, num_gpus, config.engine_executables)
            for index in range(config.role(role).replicas * settings.nnodes)
        ]
    return tuple(bundles)


def ray_hosts(bundles: Sequence[Bundle]) -> tuple[HostSettings, ...]:
    """Return the hosts of a launch on Ray, one for each bundle."""
    return tuple(HostSettings(name=bundle.name, roles=(bundle.role,)) for bundle in bundles)


@contextlib.contextmanager
def kept_agents(
    ray: Any,
    actors: Mapping[str, Any],
    endpoint: str,
    server_public: str,
    admit: Callable[[str], None],
) -> Iterator[None]:
    """Keep the agents of all actors running; ``admit`` gets the public key of each agent."""
    admitted: set[str] = set()
    closing = threading.Event()

    def run() -> None:
        while not closing.is_set():
            for name, actor in actors.items():
                try:
                    public, is_running = ray.get(actor.state.remote(), timeout=_ANSWER_TIMEOUT_S)
                    if public not in admitted:
                        admitted.add(public)
                        admit(public)
                    if not is_running:
                        start = actor.start.remote(endpoint, server_public)
                        ray.get(start, timeout=_ANSWER_TIMEOUT_S)
                except Exception as error:  # Ray raises many kinds while it moves an actor.
                    logger.debug("no answer of %s: %s", name, _first_line(error))
            closing.wait(POLL_S)

    thread = threading.Thread(target=run, name="ray", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join(_ANSWER_TIMEOUT_S)


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    """Yield ``ray``, connected to RAY_ADDRESS or to this host's cluster. Raises ConfigError."""
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            f"placement is ray, but Ray cannot be imported: {error}",
            field="placement",
            value="ray",
            fix="pip install 'pdlaunch[ray]'",
        ) from None
    address = os.environ.get("RAY_ADDRESS") or "auto"
    # Ray shows its environment to users, and its processes need no API keys.
    hidden = {name: os.environ.pop(name) for name in HIDDEN_VARIABLES if name in os.environ}
    try:
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace="pdlaunch",
            )
        except ConnectionError as error:
            raise ConfigError(
                f"no Ray cluster answers: {_first_line(error)}",
                field="RAY_ADDRESS",
                value=address,
                fix="start one with `ray start --head`, or name the head of another one, as "
                "host:port; where the cluster asks for a token, set RAY_AUTH_MODE=token",
            ) from None
        yield ray
    finally:
        with contextlib.suppress(Exception):
            ray.shutdown()
        os.environ.update(hidden)


@contextlib.contextmanager
def placed_actors(
    ray: Any,
    bundles: Sequence[Bundle],
    strategy: str,
    timeout_s: float,
    note: Callable[[str], None],
) -> Iterator[Mapping[str, Any]]:
    """Yield actors by host name once Ray has placed all bundles. Raises StartupError."""
    scheduling = importlib.import_module("ray.util.scheduling_strategies")
    group = ray.util.placement_group(
        [bundle.resources for bundle in bundles], strategy=strategy.upper()
    )
    try:
        needed = ", ".join(str(bundle) for bundle in bundles)
        is_placed = group.wait(timeout_seconds=min(_NOTE_AFTER_S, timeout_s))
        if not is_placed and timeout_s > _NOTE_AFTER_S:
            # Ray waits silently, for example for an autoscaler to add nodes.
            note(f"Ray has no room yet: the launch needs {needed}; {_offers(ray)}")
            is_placed = group.wait(timeout_seconds=timeout_s - _NOTE_AFTER_S)
        if not is_placed:
            raise StartupError(
                f"Ray has not placed the launch within {timeout_s:g} s (join_timeout_s): it needs "
                f"{needed}; {_offers(ray)}. Add nodes, or start fewer engines"
            )
        remote = ray.remote(AgentActor)
        yield {
            bundle.name: remote.options(
                num_cpus=bundle.num_cpus,
                num_gpus=bundle.num_gpus,
                max_restarts=-1,
                scheduling_strategy=scheduling.PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=index
                ),
            ).remote(bundle)
            for index, bundle in enumerate(bundles)
        }
    finally:
        with contextlib.suppress(Exception):
            ray.util.remove_placement_group(group)


def stop_agents(ray: Any, actors: Mapping[str, Any]) -> None:
    """End all agents; agents of lost nodes have ended already."""
    ending = [actor.stop.remote() for actor in actors.values()]
    with contextlib.suppress(Exception):
        ray.wait(ending, num_returns=len(ending), timeout=_ANSWER_TIMEOUT_S)


def _offers(ray: Any) -> str:
    free, total = ray.available_resources(), ray.cluster_resources()
    parts = [f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU")]
    return f"{' and '.join(parts)} are free on {sum(n['Alive'] for n in ray.nodes())} nodes"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
