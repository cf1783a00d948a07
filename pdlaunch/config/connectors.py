"""Processes without torch know this of each connector: settings, environment, where its class is.

A connector is named in ``kv_transfer.connector``. Those of pdlaunch stand in ``BUILT_IN``; another
package adds one with an entry point of the group ``pdlaunch.connectors``, whose value is a class of
``ConnectorSettings``. Only that class is imported here, so its module must be light.
docs/connectors.md shows how to write one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic_core import PydanticKnownError

from pdlaunch.config.field_types import ByteSize, Flag, FrozenModel
from pdlaunch.config.sizes import parse_size
from pdlaunch.errors import ConfigError

ENTRY_POINT_GROUP = "pdlaunch.connectors"

KVPath = Literal["auto", "nixl", "p2p"]
MooncakeProtocol = Literal["tcp", "rdma"]
RankDevice = Literal["cpu", "cuda"]
Environ = Mapping[str, str]

# Ranks tell their peers this address, and take no packet to another one
MOONCAKE_ADDRESS = "MC_TCP_BIND_ADDRESS"


@dataclass(frozen=True, slots=True)
class KVNetwork:
    """Describes how KV blocks get from and to other hosts, of which the user trusts the network."""

    address: str  # Address of this host at which data ports open
    ports: str  # First and last port that they may have: ``21000-21999``
    rdma_devices: tuple[str, ...] = ()


class ConnectorSettings(FrozenModel):
    """The section ``kv_transfer.NAME``. A connector overrides the parts that differ."""

    # ``module:callable``; called in the ranks alone as ``callable(settings, name, incarnation)``
    # with the whole ``KVTransferSettings``, the rank's name (``prefill-0/rank-0``) and its
    # incarnation. Returns a ``transfer.connectors.connector.Connector``.
    factory: ClassVar[str] = ""

    def environment(
        self, environ: Environ, device: RankDevice, network: KVNetwork | None = None
    ) -> dict[str, str]:
        """Return variables that a rank must have before the connector's libraries are imported.

        ``environ`` is the user's, whose values take precedence, except over what keeps doors shut
        (UCX_TLS). ``device``: ``cuda`` also for a rank on the CPU of a host with GPUs. ``network``:
        of a rank with peers on other hosts, if the user trusts it.
        """
        return {}

    @property
    def opens_data_ports(self) -> bool:
        """Say whether ranks open ports that ask nobody who he is to peers on other hosts.

        They do so with ``kv_transfer.trusted_network`` alone: a connector that listens by itself
        has to override this.
        """
        return False

    @property
    def joins_hosts(self) -> bool:
        """Say whether ranks reach peers on other hosts at all."""
        return True

    @property
    def maps_memory(self) -> bool:
        """Whether ranks may map their peers' KV caches, which are then allocated as shareable."""
        return False

    @property
    def opens_device_memory(self) -> bool:
        """Say whether a library may open GPU memory of ranks by itself; how fast it is then depends
        on how the memory was allocated.
        """
        return True

    @property
    def only_maps_memory(self) -> bool:
        return self.maps_memory and not self.opens_device_memory


# UCX prints how it does READs, and nothing else (``machine/ucx_log.py``)
_PRINT_READS = {"UCX_PROTO_INFO": "*memory read*"}


class NixlSettings(ConnectorSettings):
    """Joins any ranks by NIXL, and ranks of one host by mapped memory."""

    factory = "pdlaunch.transfer.connectors.paths:new_connector"

    path: KVPath = Field(
        "auto",
        description="What carries KV blocks: NIXL, or copies from mapped memory of ranks of a "
        "host (p2p); `auto` is what is faster at the handshake, for each pair.",
    )

    def environment(
        self, environ: Environ, device: RankDevice, network: KVNetwork | None = None
    ) -> dict[str, str]:
        """Return UCX's variables. UCX_TLS omits those of the user's transports that would listen
        for connections of anybody, unless ``network`` needs them.
        """
        defaults = {
            # The InfiniBand module crashes the process in a finaliser at exit (NIXL 1.5.1). RDMA
            # needs it; such ranks leave by os._exit, ahead of its finaliser.
            "UCX_MODULES": "*" if network and network.rdma_devices else "^ib",
            "UCX_WARN_UNUSED_ENV_VARS": "n",
            "NIXL_LOG_LEVEL": "WARN",
            **_PRINT_READS,
        }
        transports = local_transports(environ, device)
        if network is not None:
            to_hosts = network_transports(environ, has_rdma=bool(network.rdma_devices))
            transports = (*to_hosts, *transports)
            # In the rank the name of its device stands in the address's place.
            devices = (network.address, *(f"{name}:1" for name in network.rdma_devices))
            defaults["UCX_NET_DEVICES"] = ",".join(devices)
            defaults["UCX_TCP_PORT_RANGE"] = network.ports
            if ":" in network.address:
                defaults["UCX_TCP_AF_PRIO"] = "inet6,inet"
        return _with_defaults(environ, defaults) | {"UCX_TLS": ",".join(transports)}

    @property
    def opens_data_ports(self) -> bool:
        return self.path != "p2p"

    @property
    def joins_hosts(self) -> bool:
        return self.opens_data_ports

    @property
    def opens_device_memory(self) -> bool:
        return self.opens_data_ports

    @property
    def maps_memory(self) -> bool:
        return self.path != "nixl"


# Of connectors whose prefill side writes
SENDER_THREADS: Any = Field(
    2, ge=1, le=64, description="Threads of a prefill rank that write to its readers."
)


class MooncakeSettings(ConnectorSettings):
    """Moves KV blocks by Mooncake's transfer engine."""

    factory = "pdlaunch.transfer.connectors.mooncake:MooncakeConnector"

    num_sender_threads: int = SENDER_THREADS
    protocol: MooncakeProtocol = Field("tcp", description="What Mooncake moves KV blocks over.")
    devices: str = Field(
        "",
        description="RDMA devices that Mooncake may use, with commas between them; all when empty.",
    )

    def environment(
        self, environ: Environ, device: RankDevice, network: KVNetwork | None = None
    ) -> dict[str, str]:
        """Return Mooncake's variables: without them, Mooncake picks a transport by itself."""
        defaults = {
            # A call that gives up by its own time-out leaves its write under way: only the
            # transport's time-outs end one.
            "MC_TRANSFER_TIMEOUT": "3600",
            "MC_LOG_LEVEL": "WARNING",
            **({"MC_FORCE_TCP": "1"} if self.protocol == "tcp" else {}),
        }
        if network is not None:
            first, _, last = network.ports.partition("-")
            # Mooncake reads both spellings.
            defaults |= {f"MC_MIN_{word}_PORT": first for word in ("PRC", "RPC")}
            defaults |= {f"MC_MAX_{word}_PORT": last for word in ("PRC", "RPC")}
            if ":" in network.address:
                defaults["MC_USE_IPV6"] = "1"
        address = "127.0.0.1" if network is None else network.address
        return _with_defaults(environ, defaults) | {MOONCAKE_ADDRESS: address}

    @property
    def opens_data_ports(self) -> bool:
        return True


class FileSettings(ConnectorSettings):
    """Moves KV blocks by files in a shared folder."""

    factory = "pdlaunch.transfer.connectors.file:FileConnector"

    num_sender_threads: int = SENDER_THREADS
    directory: Annotated[str | None, Flag("kv-file-directory", metavar="DIR")] = Field(
        None, min_length=1, description="Shared folder of the file connector, which needs one."
    )
    size_limit: ByteSize = Field(
        parse_size("10GiB"),
        description="Size of that folder; what was written first is deleted first.",
    )

    @property
    def opens_device_memory(self) -> bool:
        return False


class VllmNixlSettings(ConnectorSettings):
    """Stands for vLLM's own NixlConnector, which has no settings here and proves nothing."""

    def environment(
        self, environ: Environ, device: RankDevice, network: KVNetwork | None = None
    ) -> dict[str, str]:
        """Return UCX's variables between hosts alone: on one host it cannot do without TCP."""
        if network is None:
            return _with_defaults(environ, _PRINT_READS)
        return NixlSettings().environment(environ, device, network)

    @property
    def opens_data_ports(self) -> bool:
        return True


VLLM_NIXL = "vllm-nixl"
BUILT_IN: Mapping[str, type[ConnectorSettings]] = {
    "nixl": NixlSettings,
    "mooncake": MooncakeSettings,
    "file": FileSettings,
    VLLM_NIXL: VllmNixlSettings,
}


class ConnectorImportError(ConfigError):
    """A connector's package cannot be imported, or holds something else."""


def connector_names() -> list[str]:
    """Return the names of all connectors that are installed; imports none of them."""
    return list(dict.fromkeys([*BUILT_IN, *_others()]))


def connector_settings(name: str) -> type[ConnectorSettings]:
    """Import and return the settings of a connector of ``connector_names``.

    Raises ConnectorImportError when that fails, whatever the package raises.
    """
    # First: a package that calls its connector nixl must not take the place of ours unseen.
    if name in BUILT_IN:
        return BUILT_IN[name]
    found = load_named(_others()[name], f"connector {name}")
    if not (isinstance(found, type) and issubclass(found, ConnectorSettings)):
        raise ConnectorImportError(f"connector {name}: {found!r} is no class of ConnectorSettings")
    return found


def check_connector_name(value: str) -> str:
    """Return ``value`` when such a connector is installed; validates fields of settings."""
    if value not in (names := connector_names()):
        raise PydanticKnownError("literal_error", {"expected": " or ".join(map(repr, names))})
    try:
        connector_settings(value)
    except ConnectorImportError as error:
        raise ValueError(str(error)) from None
    return value


@functools.cache
def other_sections() -> Mapping[str, type[ConnectorSettings]]:
    """Return the settings of each connector that has no field in ``KVTransferSettings``."""
    found: dict[str, type[ConnectorSettings]] = {}
    # Each is tried alone: a broken package must not take away the sections of the others.
    for name in _others():
        if name not in BUILT_IN:
            with contextlib.suppress(ConnectorImportError):
                found[name] = connector_settings(name)
    return found


def load_named(path: str, what: str) -> Any:
    """Import ``module:attribute``. Raises ConnectorImportError, which begins with ``what``."""
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # The package is somebody else's: it may raise anything.
        message = f"{what} cannot be imported from {path}: {type(error).__name__}: {error}"
        raise ConnectorImportError(message) from error


@functools.cache
def _others() -> Mapping[str, str]:
    """Return ``module:attribute`` of each connector that is imported when it is named."""
    return {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}


def _with_defaults(environ: Environ, defaults: Mapping[str, str]) -> dict[str, str]:
    return {name: environ.get(name, value) for name, value in defaults.items()}


# UCX_TLS as UCX reads it: names, groups of names, and lists of what to leave out. Source: the help
# text in libucp of UCX 1.19, as NIXL 1.5.1 ships it. Names are told apart by case.
SHARED_MEMORY = frozenset({"posix", "sysv", "xpmem", "cma", "knem"})
CUDA = frozenset({"cuda_copy", "cuda_ipc", "gdr_copy"})
RDMA = frozenset({"rc_verbs", "rc_mlx5", "ud_verbs", "ud_mlx5", "dc_mlx5", "srd"})
TCP = frozenset({"tcp"})
ALL = SHARED_MEMORY | CUDA | RDMA | TCP | {"self"}

_GROUPS: Mapping[str, frozenset[str]] = {
    "all": ALL,
    **dict.fromkeys(("sm", "shm"), SHARED_MEMORY),
    "mm": frozenset({"posix", "sysv", "xpmem"}),
    "ib": RDMA,
    "rc": frozenset({"rc_verbs", "rc_mlx5"}),
    "rc_v": frozenset({"rc_verbs"}),
    "rc_x": frozenset({"rc_mlx5"}),
    "ud": frozenset({"ud_verbs", "ud_mlx5"}),
    "ud_v": frozenset({"ud_verbs"}),
    "ud_x": frozenset({"ud_mlx5"}),
    **dict.fromkeys(("dc", "dc_x"), frozenset({"dc_mlx5"})),
    "cuda": CUDA,
}


def local_transports(environ: Environ, device: RankDevice) -> tuple[str, ...]:
    """Return the transports in UCX_TLS that open no door, for a rank whose peers are on its host.

    Network transports listen without authentication; ``sysv`` segments admit the user's whole group
    (mode 0660), ``knem`` regions everybody. ``posix`` segments are unlinked and have mode 0600, CMA
    and CUDA IPC ask for the same user. UCX finds its peers through ``posix``: lists without it,
    such as LMCache's ``cuda_ipc,cuda_copy,tcp``, rely on TCP instead, which listens.
    """
    allowed = ucx_transports(environ)
    if "posix" not in allowed:
        allowed |= {"posix", "cma", "self"}
    of_gpus = ("cuda_ipc", "cuda_copy") if device == "cuda" else ()
    return tuple(name for name in (*of_gpus, "posix", "cma", "self") if name in allowed)


def network_transports(environ: Environ, *, has_rdma: bool) -> tuple[str, ...]:
    """Return the transports in UCX_TLS that join hosts: TCP, and RDMA where there is a device."""
    allowed = ucx_transports(environ)
    wanted = (*sorted(_GROUPS["rc"]), *TCP) if has_rdma else TCP
    return tuple(name for name in wanted if name in allowed)


def ucx_transports(environ: Environ) -> frozenset[str]:
    """Return the transports that UCX may use: all when UCX_TLS is unset. Unknown names are kept."""
    value = environ.get("UCX_TLS", "all").strip() or "all"
    listed: frozenset[str] = frozenset()
    for name in map(str.strip, value.removeprefix("^").split(",")):
        # A backslash makes it the name of a transport, even where a group has the same name.
        listed |= {name[1:]} if name.startswith("\\") else _GROUPS.get(name, {name} - {""})
    return ALL - listed if value.startswith("^") else listed
