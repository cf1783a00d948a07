"""Declares the section ``kv_transfer``: settings of pulls, leases and the connector."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from pdlaunch.config import connectors
from pdlaunch.config.field_types import Flag, FrozenModel, PortRange, Switch


class KVTransferSettings(FrozenModel):
    """Holds the settings for transferring KV blocks from prefill to decode."""

    # Sections of other packages' connectors are extra fields: packages are imported when named.
    model_config = ConfigDict(extra="allow")

    # fmt: off
    connector: Annotated[
        str,
        AfterValidator(connectors.check_connector_name),
        Flag("kv-connector", metavar="nixl|mooncake|file|..."),
    ] = Field(
        "nixl",
        description="How KV blocks move: nixl, mooncake, file, or another installed connector; "
        "vllm-nixl is vLLM's own, for engines of vLLM, and does not verify blocks.")
    verify: Switch = Field(
        True,
        description="Compare checksums of pulled blocks; `off` is only for measuring, and relies "
        "on both hosts' clocks.")
    on_failure: Literal["recompute", "fail"] = Field(
        "recompute", description="What decode does when a pull fails for good.")
    lease_s: float = Field(
        30.0, gt=0,
        description="Seconds that prefill keeps blocks for a silent decode engine.")
    pull_timeout_s: float = Field(
        20.0, gt=0, description="Seconds a decode engine waits for one pull.")
    pull_attempts: int = Field(
        2, ge=1,
        description="READs of a rank's blocks that may fail before the prompt is recomputed.")
    handshake_timeout_s: float = Field(
        20.0, gt=0, description="Seconds for the handshake of one pair.")
    trusted_network: Switch = Field(
        False,
        description="Let KV blocks move between hosts through ports of NIXL or Mooncake without "
        "authentication: whoever reaches them can read and write the memory of ranks.")
    data_ports: PortRange = Field(
        "21000-21999",
        description="Ports of that network at which ranks transfer KV blocks, for firewall rules.")
    nixl: connectors.NixlSettings = connectors.NixlSettings()
    mooncake: connectors.MooncakeSettings = connectors.MooncakeSettings()
    file: connectors.FileSettings = connectors.FileSettings()
    # fmt: on

    @model_validator(mode="before")
    @classmethod
    def _check_other_sections(cls, data: Any) -> Any:
        """Check the sections of other packages' connectors; the named one may be absent."""
        if not isinstance(data, dict):
            return data
        given = {name: data[name] for name in data if name not in cls.model_fields}
        named = data.get("connector", "nixl")
        if not given and named in connectors.BUILT_IN:
            return data
        known = connectors.other_sections()
        if named in known:
            given.setdefault(named, {})
        models: dict[str, Any] = {name: (known[name], ...) for name in given if name in known}
        # Validate these sections with a temporary model, so errors name the path in each section.
        config = ConfigDict(extra="forbid")
        return data | dict(create_model("_", __config__=config, **models).model_validate(given))

    @model_validator(mode="after")
    def _has_a_directory(self) -> Self:
        if self.connector == "file" and self.file.directory is None:
            message = "it needs kv_transfer.file.directory: a folder that all engines can write to"
            raise PydanticCustomError("directory", message, {"field": "connector"})
        return self

    @property
    def is_stock(self) -> bool:
        """Return True if vLLM engines use vLLM's own connector."""
        return self.connector == connectors.VLLM_NIXL

    @property
    def connector_section(self) -> connectors.ConnectorSettings:
        """Return the settings of the connector in use."""
        return self.section(self.connector)

    def section(self, name: str) -> connectors.ConnectorSettings:
        """Return the settings of a connector, or its defaults if its section is not given."""
        found = getattr(self, name, None)
        if isinstance(found, connectors.ConnectorSettings):
            return found
        return connectors.connector_settings(name)()
