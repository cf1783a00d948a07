"""Describes each KV connector without torch: settings, environment, import path of its class.

``kv_transfer.connector`` names the connector of a launch. ``BUILT_IN`` has pdlaunch's connectors.
Another package adds a connector with an entry point in the group ``pdlaunch.connectors`` that names
a subclass of ``ConnectorSettings``. This module imports only that class, so the class's module must
not import heavy libraries. docs/connectors.md shows how to write a connector.
"""

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

# Ranks advertise this address to their peers and accept packets only on this address
MOONCAKE_ADDRESS = "MC_TCP_BIND_ADDRESS"


@dataclass(frozen=True, slots=True)
class KVNetwork:
    """Describes the trusted network that carries KV blocks between hosts."""

    address: str  # Address of this host on which data ports listen
    ports: str  # First and last allowed data port: ``21000-21999``
    rdma_devices: tuple[str, ...] = ()


class ConnectorSettings(FrozenModel):
    """The section ``kv_transfer.NAME``. A connector overrides the parts that differ."""

    # ``module:callable``. Only ranks call it, as ``callable(settings, name, incarnation)`` with
    # the whole ``KVTransferSettings``, the rank's name (``prefill-0/rank-0``) and its incarnation.
    # The callable returns a ``transfer.connectors.connector.Connector``.
    factory: ClassVar[str] = ""

    def environment(
        self, environ: Environ, device: RankDevice, network: KVNetwork | None = None
    ) -> dict[str, str]:
        """Return variables that a rank must have before the connector's libraries are imported.

        ``environ``: the user's environment. Its values take precedence, except for variables that
        keep ports closed (UCX_TLS). ``device``: ``cuda`` also for a rank on the CPU of a host with
        GPUs. ``network``: set for a rank with peers on other hosts, if the user trusts the network.
        """
        return {}

    @property
    def opens_data_ports(self) -> bool:
        """Return True if ranks open unauthenticated ports to peers on other hosts, which only
        ``kv_transfer.trusted_network`` permits. Connectors with such ports override it.
        """
        return False

    @property
    def joins_hosts(self) -> bool:
        """Return True if the connector works between ranks on different hosts."""
        return True

    @property
    def maps_memory(self) -> bool:
        """Return True if ranks may map KV caches of peers; the caches must then be shareable."""
        return False

    @property
    def opens_device_memory(self) -> bool:
        """Return True if a library may open GPU memory of ranks, such as UCX with CUDA IPC. The
        speed of its READs then depends on how the memory was allocated.
        """
        return True

    @property
    def only_maps_memory(self) -> bool:
        return self.maps_memory and not self.opens_device_memory


# Make UCX print which transports its READs use, and nothing else (parsed by machine/ucx_log.py)
_PRINT_READS = {"UCX_PROTO_INFO": "*memory read*"}


class NixlSettings(ConnectorSettings):
    """Connects all ranks through NIXL, and ranks of one host also through mapped memory."""

    factory = "pdlaunch.transfer.connectors.nixl:new_connector"

    path: KVPath = Field(
        "auto",
        description="How KV blocks move: through NIXL, or by copies from mapped memory of ranks "
        "of a host (p2p); `auto` takes the faster one in the handshake of each pair.",
    )

    def environment(
        self, environ: Environ, device: RankDevice, network: KVNetwork | None = None
    ) -> dict[str, str]:
        """Return the variables for UCX. Without ``network``, UCX_TLS excludes transports that
        accept connections from anybody, even if the user's value contains them.
        """
        rdma = network.rdma_devices if network else ()
        defaults = {
            # UCX's InfiniBand module crashes the process in a finaliser at exit (NIXL 1.5.1), so it
            # is loaded only for RDMA. Ranks with RDMA call os._exit, which skips the finaliser.
            "UCX_MODULES": "*" if rdma else "^ib",
            **{"UCX_WARN_UNUSED_ENV_VARS": "n", "NIXL_LOG_LEVEL": "WARN", **_PRINT_READS},
        }
        transports = local_transports(environ, device)
        if network is not None:
            transports = (*network_transports(environ, has_rdma=bool(rdma)), *transports)
            # The rank replaces the address by the name of the network device that has it.
            devices = (network.address, *(f"{name}:1" for name in rdma))
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


# A field of connectors in which prefill ranks write to decode ranks
SENDER_THREADS: Any = Field(
    2, ge=1, le=64, description="Threads of a prefill rank that write to decode ranks."
)


class MooncakeSettings(ConnectorSettings):
    """Moves KV blocks by Mooncake's transfer engine."""

    factory = "pdlaunch.transfer.connectors.mooncake:MooncakeConnector"

    num_sender_threads: int = SENDER_THREADS
    protocol: MooncakeProtocol = Field("tcp", description="Mooncake's transport for KV blocks.")
    devices: str = Field(
        "",
        description="RDMA devices that Mooncake may use, with commas between them; all when empty.",
    )

    def environment(
        self, environ: Environ, device: RankDevice, network: KVNetwork | None = None
    ) -> dict[str, str]:
        """Return Mooncake's variables: without them, Mooncake picks a transport by itself."""
        defaults = {
            # After this time-out a call returns, but its write goes on. Only the time-outs of the
            # transport end a write, so this one must come later.
            "MC_TRANSFER_TIMEOUT": "3600",
            "MC_LOG_LEVEL": "WARNING",
            **({"MC_FORCE_TCP": "1"} if self.protocol == "tcp" else {}),
        }
        if network is not None:
            first, _, last = network.ports.partition("-")
            # Mooncake reads both spellings, PRC and RPC.
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
        None, min_length=1, description="Shared folder; the file connector needs it."
    )
    size_limit: ByteSize = Field(
        parse_size("10GiB"),
        description="Largest size of that folder; the oldest files are deleted first.",
    )

    @property
    def opens_device_memory(self) -> bool:
        return False


class VllmNixlSettings(ConnectorSettings):
    """Selects vLLM's own NixlConnector, which has no settings here and no proof of pulls."""

    def environment(
        self, environ: Environ, device: RankDevice, network: KVNetwork | None = None
    ) -> dict[str, str]:
        if network is None:
            # UCX_TLS stays unset, because vLLM's connector needs TCP.
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
    """A connector's package cannot be imported, or its entry point names something else."""


def connector_settings(name: str) -> type[ConnectorSettings]:
    """Import and return the settings class of a connector. Raises ConnectorImportError."""
    # Built-in connectors first: another package's `nixl` must not silently replace pdlaunch's.
    if name in BUILT_IN:
        return BUILT_IN[name]
    found = load_named(_others()[name], f"connector {name}")
    if not (isinstance(found, type) and issubclass(found, ConnectorSettings)):
        raise ConnectorImportError(f"connector {name}: {found!r} is not a ConnectorSettings class")
    return found


def check_connector_name(value: str) -> str:
    """Return ``value`` if a connector of this name is installed. Raises errors for pydantic."""
    names = dict.fromkeys([*BUILT_IN, *_others()])
    if value not in names:
        raise PydanticKnownError("literal_error", {"expected": " or ".join(map(repr, names))})
    connector_settings(value)
    return value


@functools.cache
def other_sections() -> Mapping[str, type[ConnectorSettings]]:
    """Return the settings of each connector that has no field in ``KVTransferSettings``."""
    found: dict[str, type[ConnectorSettings]] = {}
    # A broken package must not hide the sections of other packages.
    for name in _others():
        if name not in BUILT_IN:
            with contextlib.suppress(ConnectorImportError):
                found[name] = connector_settings(name)
    return found


def load_named(path: str, what: str) -> Any:
    """Import ``module:attribute``. Raises ConnectorImportError with ``what`` in its message."""
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # Code of another package may raise anything.
        message = f"{what} cannot be imported from {path}: {type(error).__name__}: {error}"
        raise ConnectorImportError(message) from error


@functools.cache
def _others() -> Mapping[str, str]:
    """Return ``module:attribute`` by name for each connector that has an entry point."""
    return {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}


def _with_defaults(environ: Environ, defaults: Mapping[str, str]) -> dict[str, str]:
    return {name: environ.get(name, value) for name, value in defaults.items()}


# The syntax of UCX_TLS: names of transports, names of groups, or `^` and a list to leave out. Names
# are case-sensitive. Source: the help text in libucp of UCX 1.19, shipped with NIXL 1.5.1.
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
    """Return the safe transports in UCX_TLS, for a rank whose peers are all on its host.

    Network transports listen without authentication. ``sysv`` segments are open to the user's whole
    group (mode 0660), ``knem`` regions to everybody. ``posix`` segments are unlinked and have mode
    0600; CMA and CUDA IPC require the same user. UCX finds peers through ``posix``. Lists without
    ``posix``, such as LMCache's ``cuda_ipc,cuda_copy,tcp``, rely on TCP instead, which listens; for
    such a list the result has ``posix``, CMA and ``self`` in TCP's place.
    """
    allowed = ucx_transports(environ)
    if "posix" not in allowed:
        allowed |= {"posix", "cma", "self"}
    of_gpus = ("cuda_ipc", "cuda_copy") if device == "cuda" else ()
    return tuple(name for name in (*of_gpus, "posix", "cma", "self") if name in allowed)


def network_transports(environ: Environ, *, has_rdma: bool) -> tuple[str, ...]:
    """Return the transports in UCX_TLS between hosts: TCP, and RDMA if ``has_rdma``."""
    allowed = ucx_transports(environ)
    wanted = (*sorted(_GROUPS["rc"]), *TCP) if has_rdma else TCP
    return tuple(name for name in wanted if name in allowed)


def ucx_transports(environ: Environ) -> frozenset[str]:
    """Return the transports that UCX_TLS allows, unknown names included; all when it is unset."""
    value = environ.get("UCX_TLS", "all").strip() or "all"
    listed: frozenset[str] = frozenset()
    for name in map(str.strip, value.removeprefix("^").split(",")):
        # After a backslash UCX reads a transport's name, even if a group has the same name.
        listed |= {name[1:]} if name.startswith("\\") else _GROUPS.get(name, {name} - {""})
    return ALL - listed if value.startswith("^") else listed
