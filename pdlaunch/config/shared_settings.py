"""Settings that all engines and the router share; roles cannot override them."""

from typing import Annotated, Literal

from pydantic import Field

from pdlaunch.config.field_types import NATIVE_ALONE, ByteSize, Flag, FrozenModel
from pdlaunch.config.http_names import HostNames
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.config.sizes import parse_size

GenerationConfig = Literal["auto", "vllm"]
RoutingPolicy = Literal["load", "pairs"]
ONE_ENGINE_POLICIES: tuple[RoutingPolicy, ...] = ("load",)  # a decode engine may serve alone
AutopilotMode = Literal["off", "dry-run", "on"]

DEPLOYMENT = "Deployment"  # The panel of flags that are not about engines


class LimitSettings(FrozenModel):
    """Limits beyond which a router or an engine refuses requests."""

    # fmt: off
    max_body_bytes: ByteSize = Field(
        parse_size("16MiB"),
        description="Longest body of an HTTP request; the bodies of all requests in flight may "
        "have eight times as many bytes.")
    max_queued_requests: int = Field(
        1024, gt=0, description="Requests in flight at the router or an engine; one more gets 429.")
    max_connections: int = Field(
        4096, gt=0,
        description="Open connections at the router or an engine; beyond them, new connections "
        "replace idle ones.")
    request_timeout_s: float = Field(600.0, gt=0, description="Time that a request may take.")
    # fmt: on


class RoutingSettings(FrozenModel):
    """Holds the settings with which a router chooses engines for a request."""

    # fmt: off
    policy: Annotated[RoutingPolicy, Flag("routing", DEPLOYMENT)] = Field(
        "load",
        description="Which engines serve a request: `load` takes those with the least load, "
        "which may be one engine for both phases; `pairs` takes a prefill and a decode engine "
        "if there are both.")
    # fmt: on


class SharedSettings(FrozenModel):
    """Holds settings that all engines share and roles cannot override."""

    # fmt: off
    kv_transfer: KVTransferSettings = KVTransferSettings()
    limits: LimitSettings = LimitSettings()
    routing: RoutingSettings = RoutingSettings()
    allowed_hosts: Annotated[HostNames, Flag(panel=DEPLOYMENT, for_router=True)] = Field(
        (),
        description="Further names of the router or an engine in clients' URLs (Host header); "
        "`*` for any.")
    generation_config: Annotated[GenerationConfig, Flag(), NATIVE_ALONE] = Field(
        "auto",
        description="Sampling defaults of requests: `auto` takes those of the model's "
        "generation_config.json, `vllm` neutral ones.")
    # fmt: on
