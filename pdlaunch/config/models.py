"""Declares the settings of a launch, each once: frozen models that refuse unknown fields.

``config.sources`` merges a YAML file, ``PDLAUNCH_*`` variables and flags into a ``LaunchConfig``.
Its top level holds ``SharedSettings`` and ``EngineSettings``. The sections ``prefill``, ``decode``
and ``both`` set the number of engines of each role and may override any of ``EngineSettings``.
``config.settings`` derives flags, variables and docs.
"""

import hashlib
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pdlaunch.config.engine_settings import BothSettings, EngineSettings, RoleSettings
from pdlaunch.config.external import RunningEngines, named
from pdlaunch.config.field_types import Flag, FrozenModel, override
from pdlaunch.config.hosts import HostAddress, Hosts, Placement, PlacementStrategy
from pdlaunch.config.roles import PAIR, ROLES, Role
from pdlaunch.config.shared_settings import DEPLOYMENT, AutopilotMode, SharedSettings

ROUTER = "Engines that run already"  # The panel of flags that only `pdlaunch router` has

HOSTS = "Hosts"  # The panel of flags for launches on several hosts

_HOSTS_HELP = "Names of the hosts that engines are placed on; `local` is this host."

MIN_AGENT_TIMEOUT_S = 2.0
MIN_HANG_TIMEOUT_S = 5.0
MAX_PORT = 65535


def _check_sha256(digest: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", digest):
        # The value may be the key itself, so it is not shown.
        raise ValueError('write the 64 hexadecimal digits of `printf %s "$KEY" | sha256sum`')
    return digest


class ApiKey(FrozenModel):
    """Describes an API key of clients and its limits."""

    # fmt: off
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        description="Name in metrics and errors.")
    sha256: Annotated[str, AfterValidator(_check_sha256)] = Field(
        description="Hash of the key: `printf %s \"$KEY\" | sha256sum`.")
    max_concurrent: int | None = Field(
        None, gt=0,
        description="Its prompts in flight; one more gets 429. When unset and there are several "
        "keys, three quarters of `limits.max_queued_requests`.")
    tokens_per_minute: int | None = Field(
        None, gt=0, description="Tokens of its prompts and answers per minute; beyond them, 429.")
    weight: float = Field(
        1.0, ge=0.01, le=100,
        description="Its share of the engines while prompts of several keys wait.")
    # fmt: on


def _refuse_text(value: object) -> object:
    if isinstance(value, str):
        raise ValueError("write the list into the file; PDLAUNCH_API_KEY gives a single key")
    return value


def _check_hang_timeout(value: float) -> float:
    if 0 < value < MIN_HANG_TIMEOUT_S:
        why = "in which a process sends several heartbeats"
        raise ValueError(f"must be 0 (off) or at least {MIN_HANG_TIMEOUT_S:g} s, {why}")
    return value


def _differ(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        if twice := next((key for key in keys if values.count(getattr(key, field)) > 1), None):
            raise ValueError(f"two keys have the {field} of {twice.name}")
    return keys


class LaunchConfig(SharedSettings, EngineSettings):
    """Describes one deployment of engines behind one router."""

    # fmt: off
    prefill: RoleSettings = RoleSettings()
    decode: RoleSettings = RoleSettings()
    both: BothSettings = BothSettings()
    served_model_name: Annotated[str | None, Flag(panel=DEPLOYMENT, for_router=True)] = Field(
        None, min_length=1, description="Name in the API; the model's own name when unset.")
    host: Annotated[str, Flag(panel=DEPLOYMENT, for_router=True)] = Field(
        "127.0.0.1", min_length=1, description="Address of the router.")
    port: Annotated[int, Flag(panel=DEPLOYMENT, for_router=True)] = Field(
        8000, ge=0, le=65535, description="Port of the router; 0 picks a free one.")
    api_key: Annotated[SecretStr | None, Flag(panel=DEPLOYMENT, for_router=True)] = Field(
        None, min_length=1, description="Key that clients must send as a bearer token.")
    api_keys: Annotated[
        tuple[ApiKey, ...], BeforeValidator(_refuse_text), AfterValidator(_differ)
    ] = Field(
        (),
        description="Keys of clients by name, hashed: `[{name, sha256, max_concurrent, "
        "tokens_per_minute, weight}]`. With several keys, none starves the others.")
    ssl_certfile: Annotated[
        str | None, Flag(panel=DEPLOYMENT, for_router=True, metavar="FILE")
    ] = Field(
        None, min_length=1,
        description="Certificate chain of the router, PEM; clients then use https. Read again "
        "when it changes.")
    ssl_keyfile: Annotated[
        str | None, Flag(panel=DEPLOYMENT, for_router=True, metavar="FILE")
    ] = Field(
        None, min_length=1, description="Private key of ssl_certfile; in that file when unset.")
    admin_api_key: Annotated[SecretStr | None, Flag(panel=DEPLOYMENT, for_router=True)] = Field(
        None, min_length=1,
        description="Key for sleep, wake and other commands over HTTP; without it, commands work "
        "only at a local socket.")
    engine_api_key: Annotated[SecretStr | None, Flag(panel=DEPLOYMENT)] = Field(
        None, min_length=1,
        description="Key with which another router may use the engines; without it, only the "
        "launch's own router may.")
    engines: Annotated[RunningEngines, AfterValidator(lambda them: tuple(named(them)))] = Field(
        (),
        description="Engines that already run, for `pdlaunch router`: `[{name, role, url, "
        "api_key_env}]`, or `prefill=URL`.")
    engines_file: Annotated[str | None, Flag(panel=ROUTER, metavar="FILE")] = Field(
        None, min_length=1,
        description="YAML file with further `engines`, which `pdlaunch router` watches.")
    placement: Annotated[Placement, Flag(panel=HOSTS)] = Field(
        "local",
        description="`local` starts engines on this host, `hosts` on the hosts in `hosts`, which "
        "run agents; `ray` and `slurm` on hosts of Ray or Slurm.")
    hosts: Annotated[Hosts, Flag(panel=HOSTS, metavar="NAMES", help=_HOSTS_HELP)] = Field(
        (),
        description="Hosts that engines are placed on: `[{name, bind_address, advertise_address, "
        "roles, machine}]`, or names; `local` is this host.")
    placement_strategy: Annotated[PlacementStrategy, Flag(panel=HOSTS)] = Field(
        "pack",
        description="`pack` fills one host after another, so that pairs share a host; `spread` "
        "takes the emptiest host.")
    control_address: Annotated[HostAddress | None, Flag(panel=HOSTS)] = Field(
        None,
        description="Address at which other hosts reach the supervisor; when unset, this host's "
        "address on the default route.")
    control_port: Annotated[int, Flag(panel=HOSTS)] = Field(
        0, ge=0, le=MAX_PORT, description="Port at which agents join; 0 picks a free one.")
    join_file: Annotated[str | None, Flag(panel=HOSTS, metavar="FILE")] = Field(
        None, min_length=1,
        description="File that `pdlaunch agent --join` reads; in the folder of the logs if unset.")
    join_timeout_s: Annotated[float, Flag("join-timeout", HOSTS)] = Field(
        300.0, gt=0, description="Time for the agents of all hosts to join.")
    agent_timeout_s: Annotated[float, Flag("agent-timeout", HOSTS)] = Field(
        20.0, ge=MIN_AGENT_TIMEOUT_S,
        description="Time without messages from the supervisor after which an agent ends its "
        "processes.")
    autopilot: Annotated[AutopilotMode, Flag(panel=DEPLOYMENT)] = Field(
        "off",
        description="`on`: change the roles of engines when the load changes; `dry-run`: only log "
        "the changes.")
    log_dir: Annotated[str | None, Flag(panel=DEPLOYMENT, metavar="DIR")] = Field(
        None,
        description="Folder of the log files. When unset, each launch makes one and the latest "
        "20 are kept.")
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Flag(panel=DEPLOYMENT, for_router=True)
    ] = Field("info", description="Least severe level that is logged.")
    log_format: Annotated[Literal["text", "json"], Flag(panel=DEPLOYMENT, for_router=True)] = Field(
        "text", description="Format of the lines in log files.")
    startup_timeout_s: Annotated[float, Flag("startup-timeout", DEPLOYMENT)] = Field(
        600.0, gt=0,
        description="Time from the start of the first process, after joining and downloads, "
        "until the deployment is ready.")
    drain_timeout_s: Annotated[float, Flag("drain-timeout", DEPLOYMENT, for_router=True)] = Field(
        30.0, ge=0, description="Time that running requests get after SIGTERM or Ctrl-C.")
    hang_timeout_s: Annotated[float, AfterValidator(_check_hang_timeout)] = Field(
        60.0, ge=0,
        description="A process is restarted if its main loop stands still for this time, which "
        "must be longer than any step. 0 for never.")
    # fmt: on

    @model_validator(mode="after")
    def _has_hosts_to_place_on(self) -> Self:
        if self.placement == "hosts" and not self.hosts:
            message = "placement is hosts, but hosts is empty: name them, as in --hosts a,b"
            raise _refused("hosts", message)
        if self.placement != "hosts" and self.hosts:
            message = f"hosts are named, but placement is {self.placement}: set placement to hosts"
            raise _refused("hosts", message)
        return self

    # Runs before the fields are read: afterwards, a given count looks like the default.
    @model_validator(mode="before")
    @classmethod
    def _leave_pairs_out(cls, values: Any) -> Any:
        """Set ``replicas`` of prefill and decode to 0 if only those of ``both`` are given."""
        try:
            both = BothSettings.model_validate(values["both"])
            pair = {name: RoleSettings.model_validate(values.get(name, {})) for name in PAIR}
        except (LookupError, TypeError, ValidationError):
            return values  # Not given, or invalid: the validation of the fields reports errors
        if not both.replicas or any("replicas" in one.model_fields_set for one in pair.values()):
            return values
        return values | {name: one.model_copy(update={"replicas": 0}) for name, one in pair.items()}

    @model_validator(mode="after")
    def _has_a_key_for_each_door(self) -> Self:
        """Require different keys for clients, commands and other routers."""
        # Otherwise holders of one key would have the rights of another.
        seen: dict[str, str] = {key.sha256: f"the key {key.name}" for key in self.api_keys}
        for name in ("api_key", "admin_api_key", "engine_api_key"):
            key: SecretStr | None = getattr(self, name)
            if key is None:
                continue
            digest = hashlib.sha256(key.get_secret_value().encode()).hexdigest()
            if (other := seen.setdefault(digest, name)) != name:
                raise _refused(name, f"must differ from {other}, which other people hold")
        return self

    @model_validator(mode="after")
    def _has_a_port_for_each_server(self) -> Self:
        if self.ssl_keyfile and not self.ssl_certfile:
            raise _refused("ssl_keyfile", "needs a certificate: set ssl_certfile, too")
        # Check here, before a process tries to listen.
        taken = {self.port: "port"} if self.port else {}
        for role in ROLES:
            ports, field = self.role(role).ports(), f"{role}.port"
            if ports and self.engine_api_key is None:
                message = "no router could use it: set engine_api_key, the bearer token that "
                raise _refused(field, f"{message}another router sends to the engines")
            if ports and ports[-1] > MAX_PORT:
                message = f"its engines would need ports up to {ports[-1]}; choose a lower one"
                raise _refused(field, message)
            for port in ports:
                if port in taken:
                    apart = f"choose ports {len(ports)} or more apart"
                    message = f"port {port} would also be used for {taken[port]}; {apart}"
                    raise _refused(field, message)
                taken[port] = field
        return self

    def role(self, role: Role) -> RoleSettings:
        section: RoleSettings = getattr(self, role)
        return section

    @property
    def engine_executables(self) -> tuple[str, ...]:
        """Return the executables of vLLM engines, each once."""
        settings = [self.engine_settings(role) for role in ROLES if self.role(role).replicas]
        commands = (each.engine_command for each in settings if each.engine == "vllm")
        return tuple(dict.fromkeys(commands))

    def engine_settings(self, role: Role) -> EngineSettings:
        shared = {name: getattr(self, name) for name in EngineSettings.model_fields}
        return override(EngineSettings.model_validate(shared), self.role(role))


def _refused(field: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("settings", message, {"field": field})
