"""Places the engines of a launch on a Ray cluster: one bundle and one agent for each engine.

::

    placement group   bundle 0 (prefill-0)   bundle 1 (decode-0)   ..    PACK or SPREAD over nodes
    actor             holds its CPUs, GPUs; runs `pdlaunch agent`  ..
    a node is lost    Ray places the bundle and the actor elsewhere; this thread starts its agent
                      again, which joins under the same name

A bundle is on one node, so an engine is too.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdlaunch.config.hosts import HostSettings
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES, Role
from pdlaunch.errors import ConfigError, StartupError
from pdlaunch.launch.hosts.local import HIDDEN_VARIABLES
from pdlaunch.launch.hosts.placement.ray_actor import AgentActor, AgentState
from pdlaunch.protocol.process.run_dirs import new_run_dir

logger = logging.getLogger(__name__)

POLL_S = 1.0
_ANSWER_TIMEOUT_S = 10.0
_MAKES_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
"""Ray itself sets the first of these, too."""
_ALLOCATING = {"pack": "PACK", "spread": "SPREAD"}


@dataclass(frozen=True, slots=True)
class Bundle:
    """Asks Ray for the room of one engine."""

    name: str  # the host's name in the launch: ``ray-prefill-0``
    role: Role
    num_cpus: int
    num_gpus: int
    executables: tuple[str, ...] = ()  # programs of engines that its agent allows

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": float(self.num_cpus)} | (
            {"GPU": float(self.num_gpus)} if self.num_gpus else {}
        )


def ray_bundles(config: LaunchConfig, *, has_gpus: bool = False) -> tuple[Bundle, ...]:
    """Return what each engine needs: a core for each thread of a rank, and a GPU.

    ``has_gpus``: engines whose device is ``auto`` run on GPUs.
    """
    bundles: list[Bundle] = []
    for role in ROLES:
        settings = config.engine_settings(role)
        on_cpu = settings.device == "cpu" or (settings.device == "auto" and not has_gpus)
        tp_size = settings.tensor_parallel_size
        threads = (settings.num_threads or 1) if on_cpu else 1
        num_cpus, num_gpus = tp_size * threads, 0 if on_cpu else tp_size
        bundles += [
            Bundle(f"ray-{role}-{index}", role, num_cpus, num_gpus, config.engine_executables)
            for index in range(config.role(role).replicas)
        ]
    return tuple(bundles)


def ray_hosts(bundles: Sequence[Bundle]) -> tuple[HostSettings, ...]:
    """Return the hosts of a launch on Ray, one for each engine."""
    return tuple(HostSettings(name=bundle.name, roles=(bundle.role,)) for bundle in bundles)


class RayAgents:
    """Keeps an agent running for each engine; a thread asks Ray once a second."""

    def __init__(
        self,
        ray: Any,
        actors: Mapping[str, Any],
        endpoint: str,
        server_public: str,
        admit: Callable[[str], None],
    ) -> None:
        """``admit``: lets the agent with this public key join."""
        self._ray = ray
        self._actors = actors
        self._endpoint = endpoint
        self._server_public = server_public
        self._admit = admit
        self._admitted: set[str] = set()
        self._seen: set[str] = set()
        self._waiting: set[str] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Have no agent started any more."""
        self._closing.set()
        self._thread.join(_ANSWER_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            for name, actor in self._actors.items():
                self._look_after(name, actor)
            self._closing.wait(POLL_S)

    def _look_after(self, name: str, actor: Any) -> None:
        try:
            state: AgentState = self._ray.get(actor.state.remote(), timeout=_ANSWER_TIMEOUT_S)
            self._seen.add(name)
            if state["public"] not in self._admitted:
                self._admitted.add(state["public"])
                self._admit(state["public"])
            if not state["is_started"] or state["returncode"] is not None:
                self._ray.get(
                    actor.start.remote(self._endpoint, self._server_public),
                    timeout=_ANSWER_TIMEOUT_S,
                )
            if name in self._waiting:
                self._waiting.discard(name)
                logger.warning("Ray has found room for %s again", name)
        except Exception as error:  # Of many kinds, by what Ray has lost.
            was_there = name in self._seen and name not in self._waiting
            if was_there and not self._closing.is_set():
                self._waiting.add(name)
                logger.warning("Ray has no room for %s now: %s", name, _first_line(error))


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    """Yield Ray, connected to RAY_ADDRESS, else to this host's cluster, else to one of its own.

    Raises ConfigError where Ray is not installed or does not answer, and StartupError.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            f"placement is ray, which cannot be imported: {error}",
            field="placement",
            value="ray",
            fix="pip install 'pdlaunch[ray]'",
        ) from None
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "pdlaunch"}
    # Ray's child processes need no key, and it shows its environment.
    hidden = {name: os.environ.pop(name) for name in HIDDEN_VARIABLES if name in os.environ}
    own = contextlib.ExitStack()
    try:
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS") or "auto", **quiet)
        except ConnectionError as error:
            if os.environ.get("RAY_ADDRESS"):
                raise ConfigError(
                    f"no Ray cluster answers: {_first_line(error)}",
                    field="RAY_ADDRESS",
                    value=os.environ["RAY_ADDRESS"],
                    fix="name the head's address, as host:port, or unset it to use this host "
                    "alone; where the cluster asks for a token, set RAY_AUTH_MODE=token",
                ) from None
            # A cluster that is made for this launch is for this host alone, and leaves no files.
            folder = own.enter_context(new_run_dir())
            own.enter_context(_for_this_host_alone(folder))
            ray.init(address="local", include_dashboard=False, _temp_dir=str(folder), **quiet)
            if not ipaddress.ip_address(own_address(ray)).is_loopback:
                raise StartupError(
                    f"Ray {ray.__version__} listens at {own_address(ray)} for all of the network: "
                    "start a cluster with `ray start --head`, and set RAY_ADDRESS"
                ) from None
        yield ray
    finally:
        with contextlib.suppress(Exception):
            ray.shutdown()
        own.close()
        os.environ.update(hidden)


@contextlib.contextmanager
def _for_this_host_alone(folder: Path) -> Iterator[None]:
    """Have Ray, and what it starts, take the loopback device for this host's address, and a token
    of its own.

    The address would be that of the default route, whatever ``ray.init`` is told; only where Ray
    makes no clusters, as on macOS, does it keep to this host. The token would stay in the user's
    home, and be asked for by all clusters from then on.
    """
    constants: Any = importlib.import_module("ray._private.ray_constants")
    makes_clusters, before = constants.ENABLE_RAY_CLUSTER, dict(os.environ)
    constants.ENABLE_RAY_CLUSTER = False
    os.environ[_MAKES_CLUSTERS] = "0"
    token = folder / "ray-token"
    token.touch(0o600)
    token.write_text(secrets.token_hex())
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(token))
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = makes_clusters
        for name in (_MAKES_CLUSTERS, *_AUTHENTICATION):
            os.environ.pop(name, None)
            os.environ.update({name: before[name]} if name in before else {})


def has_gpus(ray: Any) -> bool:
    """Tell whether the cluster has GPUs."""
    return bool(ray.cluster_resources().get("GPU"))


def own_address(ray: Any) -> str:
    """Return this host's address in the cluster."""
    return str(ray.util.get_node_ip_address())


@contextlib.contextmanager
def placed_actors(
    ray: Any, bundles: Sequence[Bundle], strategy: str, timeout_s: float
) -> Iterator[Mapping[str, Any]]:
    """Yield an actor for each bundle once Ray has placed all. Raises StartupError when it cannot.

    Ray itself would wait without a word.
    """
    scheduling = importlib.import_module("ray.util.scheduling_strategies")
    group = ray.util.placement_group(
        [bundle.resources for bundle in bundles], strategy=_ALLOCATING[strategy]
    )
    try:
        if not group.wait(timeout_seconds=timeout_s):
            raise StartupError(
                f"Ray has not placed the launch within {timeout_s:g} s (join_timeout_s): it needs "
                f"{_shown(bundles)}; {_offers(ray)}. Add nodes, or start fewer engines"
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
            ).remote(bundle.name, bundle.num_cpus, bundle.executables)
            for index, bundle in enumerate(bundles)
        }
    finally:
        with contextlib.suppress(Exception):
            ray.util.remove_placement_group(group)


def stop_agents(ray: Any, actors: Mapping[str, Any]) -> None:
    """Have every agent end; those of lost nodes have ended already."""
    ending = [actor.stop.remote() for actor in actors.values()]
    with contextlib.suppress(Exception):
        ray.wait(ending, num_returns=len(ending), timeout=_ANSWER_TIMEOUT_S)


def _shown(bundles: Sequence[Bundle]) -> str:
    return ", ".join(f"{bundle.name} {_resources(bundle.resources)}" for bundle in bundles)


def _offers(ray: Any) -> str:
    free = ray.available_resources()
    total = ray.cluster_resources()
    parts = [f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU")]
    return f"free are {' and '.join(parts)} on {sum(n['Alive'] for n in ray.nodes())} nodes"


def _resources(resources: Mapping[str, float]) -> str:
    return "(" + ", ".join(f"{kind} {num:g}" for kind, num in resources.items()) + ")"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
