"""Makes bootstraps: the settings and keys that each process reads from stdin at its start."""

import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from pydantic import SecretStr

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import PAIR
from pdlaunch.launch.engines import EngineKind
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.protocol.certificates import CertificateFiles
from pdlaunch.protocol.control import Capabilities
from pdlaunch.protocol.engine_link import ConnectorSpec
from pdlaunch.protocol.ids import EngineId
from pdlaunch.protocol.process.bootstrap import Bootstrap, ClientKey, DoorSpec, RouterSpec
from pdlaunch.protocol.sockets import LaunchKeys

# Number of heartbeats (Alive) of a process, and of checks, within ``hang_timeout_s``.
HEARTBEATS = 6


@dataclass(eq=False)
class Bootstraps:
    """Makes the bootstraps of one launch, whose models are converted already."""

    kind: EngineKind
    keys: LaunchKeys
    control: str
    run_dir: Path
    launch_id: str
    listeners: Sequence[socket.socket]  # of the public address, all with the same port
    # Specs by engine: a restarted engine gets its first spec again, whatever changed since.
    _engines: dict[str, EngineSpec] = field(default_factory=dict)

    def forget(self, engine: str) -> None:
        self._engines.pop(engine, None)
        for path in self.run_dir.glob(f"{engine}.*"):
            path.unlink(missing_ok=True)

    def make(self, spec: ProcessSpec, incarnation: int, launch: ResolvedLaunch) -> Bootstrap:
        config, host = launch.config, launch.host(spec.host)
        engine = None
        if spec.engine and self.kind.name == "native":
            if spec.engine not in self._engines:
                placed = next(each for each in launch.engines if each.name == spec.engine)
                self._engines[spec.engine] = launch.engine_spec(placed)
            here = {name: getattr(host, name) for name in ("bind_address", "advertise_address")}
            engine = self._engines[spec.engine].model_copy(update=here)
        # Servers of native engines (those with a spec) listen on the network themselves.
        is_vllm, is_server = spec.role is not None and engine is None, spec.kind == "server"
        says = is_vllm or is_server
        router = None
        if spec.kind == "router":
            router = router_spec(config, launch.served_model_name, self.listeners)
            paths = (engines.model.path for engines in launch.roles.values())
            router = msgspec.structs.replace(router, model_dir=next(filter(None, paths), ""))
        return Bootstrap(
            name=spec.name,
            incarnation=incarnation,
            control=self.control,
            keys=self.keys,
            run_dir=str(self.run_dir),
            log_level=config.log_level,
            log_format=config.log_format,
            engine_json=None if engine is None else engine.model_dump_json(),
            engine_api_key=None if spec.kind == "rank" else _plain(config.engine_api_key),
            capabilities=self.kind.capabilities(spec, engine) if says else Capabilities(),
            router=router,
            door=self._door(spec, launch) if is_vllm and is_server else None,
            connector=self._connector(spec, incarnation, launch) if is_vllm else None,
            tp_rank=spec.tp_rank,
            # Each incarnation of ranks needs its own file to meet: that of a dead incarnation still
            # lists its ranks.
            rendezvous=f"file://{self.run_dir}/{spec.engine}.tp.{incarnation}",
            launch_id=self.launch_id,
            heartbeat_s=config.hang_timeout_s / HEARTBEATS,
        )

    def _connector(
        self, spec: ProcessSpec, incarnation: int, launch: ResolvedLaunch
    ) -> ConnectorSpec | None:
        transfer, host = launch.config.kv_transfer, launch.host(spec.host)
        if transfer.is_stock or spec.role not in PAIR:
            return None
        return ConnectorSpec(
            role=spec.role,
            bind_address=host.bind_address,
            advertise_address=host.advertise_address,
            kv_transfer=transfer.model_dump_json(),
            by_head=len({launch.roles[role].tp_size for role in PAIR if role in launch.roles}) > 1,
            engine_id=EngineId(f"{self.launch_id}/{spec.engine}#{incarnation}"),
            dp_size=launch.roles[spec.role].settings.data_parallel_size,
        )

    def _door(self, spec: ProcessSpec, launch: ResolvedLaunch) -> DoorSpec | None:
        if not launch.spans_hosts:
            return None
        config, host = launch.config, launch.host(spec.host)
        assert spec.role is not None
        return DoorSpec(
            bind_address=host.bind_address,
            advertise_address=host.advertise_address,
            port=spec.ports["http"],
            data_ports=config.kv_transfer.data_ports,
            max_model_len=launch.roles[spec.role].max_model_len,
            max_body_bytes=config.limits.max_body_bytes,
            max_connections=config.limits.max_connections,
        )


def router_spec(
    config: LaunchConfig, served_model_name: str, listeners: Sequence[socket.socket]
) -> RouterSpec:
    """Return the settings of a router that accepts connections at ``listeners``, of one port."""
    # Fields of RouterSpec have the names of settings; the router reads no configuration itself.
    settings = {
        name: getattr(section, name)
        for section in (config, config.limits)
        for name in RouterSpec.__struct_fields__
        if hasattr(section, name)
    }
    own = {
        "port": int(listeners[0].getsockname()[1]),
        "listeners": tuple(listener.fileno() for listener in listeners),
        "served_model_name": served_model_name,
        "certificate": CertificateFiles.given(config.ssl_certfile, config.ssl_keyfile),
        "keys": _client_keys(config),
        "admin_api_key": _plain(config.admin_api_key),
        "routing": config.routing.policy,
    }
    return RouterSpec(**settings | own)


def _client_keys(config: LaunchConfig) -> tuple[ClientKey, ...]:
    """Return the keys of clients, including ``api_key``, which has no limits of its own."""
    keys = [ClientKey(**key.model_dump()) for key in config.api_keys]
    if (plain := _plain(config.api_key)) is not None:
        keys.append(ClientKey(name="api_key", sha256=hashlib.sha256(plain.encode()).hexdigest()))
    # With several keys, no key may take all places in the router's queue.
    most = max(1, config.limits.max_queued_requests * 3 // 4) if len(keys) > 1 else None
    replace = msgspec.structs.replace
    return tuple(replace(key, max_concurrent=key.max_concurrent or most) for key in keys)


def _plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
