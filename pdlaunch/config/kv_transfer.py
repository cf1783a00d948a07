"""Declares the section ``kv_transfer``: how KV blocks get from prefill to decode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pdlaunch.config.connectors import (
    BUILT_IN,
    NO_SPEC,
    ConnectorImportError,
    ConnectorSpec,
    FileSettings,
    KVNetwork,
    MooncakeSettings,
    NixlSettings,
    RankDevice,
    check_connector_name,
    connector_spec,
    other_sections,
)
from pdlaunch.config.field_types import NATIVE_ALONE, Flag, FrozenModel, PortRange, Switch


def _with_other_sections(schema: dict[str, JsonValue]) -> None:
    properties = schema["properties"]
    assert isinstance(properties, dict)
    for name, model in other_sections().items():
        properties[name] = True if model is None else model.model_json_schema()
    schema["additionalProperties"] = False


class KVTransferSettings(FrozenModel):
    """Settings of the way that KV blocks take from prefill to decode."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_with_other_sections)

    # fmt: off
    connector: Annotated[str, Flag("kv-connector", metavar="nixl|mooncake|file|...")] = Field(
        "nixl",
        description="What moves KV blocks: nixl, mooncake, file, or another installed connector.")
    verify: Switch = Field(
        True,
        description="Compare checksums of pulled blocks; `off`, only for measuring, trusts both "
        "hosts' clocks.")
    on_failure: Literal["recompute", "fail"] = Field(
        "recompute", description="What decode does when a pull fails for good.")
    lease_s: float = Field(
        30.0, gt=0,
        description="Seconds prefill keeps blocks for a decode engine that says nothing.")
    pull_timeout_s: Annotated[float, NATIVE_ALONE] = Field(
        20.0, gt=0, description="Seconds a decode engine waits for one pull.")
    pull_attempts: Annotated[int, NATIVE_ALONE] = Field(
        2, ge=1,
        description="READs of a rank's blocks that may fail before the prompt is recomputed.")
    handshake_timeout_s: Annotated[float, NATIVE_ALONE] = Field(
        20.0, gt=0, description="Seconds for the handshake of one pair.")
    trusted_network: Switch = Field(
        False,
        description="Let KV blocks go between hosts over ports of NIXL or Mooncake, which ask "
        "nobody who he is: whoever reaches them can read and write the memory of ranks.")
    data_ports: PortRange = Field(
        "21000-21999",
        description="Ports of that network at which ranks take KV blocks, for a firewall's rules.")
    nixl: NixlSettings = NixlSettings()
    mooncake: MooncakeSettings = MooncakeSettings()
    file: FileSettings = FileSettings()
    # fmt: on

    @field_validator("connector")
    @classmethod
    def _is_installed(cls, value: str) -> str:
        return check_connector_name(value)

    @model_validator(mode="before")
    @classmethod
    def _check_other_sections(cls, data: Any) -> Any:
        """Check the sections of other packages' connectors; the named one may be absent."""
        if not isinstance(data, dict):
            return data
        given = {name: data[name] for name in data if name not in cls.model_fields}
        named = data.get("connector", "nixl")
        if not given and named in BUILT_IN:
            return data
        known = other_sections()
        if named in known:
            given.setdefault(named, {})
        models: dict[str, Any] = {
            name: (known[name] or dict[str, Any], ...) for name in given if name in known
        }
        config = ConfigDict(extra="forbid")
        return data | dict(create_model("_", __config__=config, **models).model_validate(given))

    @model_validator(mode="after")
    def _has_a_directory(self) -> Self:
        if self.carrier == "file" and self.file.directory is None:
            message = "it needs kv_transfer.file.directory: a folder that all engines can write to"
            raise PydanticCustomError("directory", message, {"field": "connector"})
        return self

    @property
    def carrier(self) -> str:
        """Return the name of the connector that moves the bytes: the innermost where one wraps
        another.
        """
        name = self.connector
        while (inner := _spec_of(name).inner(self.section(name))) is not None:
            name = inner
        return name

    def section(self, name: str) -> FrozenModel:
        """Return the settings of a connector; its defaults where none were given."""
        found = getattr(self, name, None)
        return found if isinstance(found, FrozenModel) else _spec_of(name).settings()

    # What the spec of the carrier says of its section; ``ConnectorSpec`` explains each.
    @property
    def maps_memory(self) -> bool:
        return self._spec.maps_memory(self.section(self.carrier))

    @property
    def opens_device_memory(self) -> bool:
        return self._spec.opens_device_memory(self.section(self.carrier))

    @property
    def only_maps_memory(self) -> bool:
        return self.maps_memory and not self.opens_device_memory

    @property
    def opens_data_ports(self) -> bool:
        return self._spec.opens_data_ports(self.section(self.carrier))

    @property
    def joins_hosts(self) -> bool:
        return self._spec.joins_hosts(self.section(self.carrier))

    @property
    def folders(self) -> dict[str, str]:
        """Return the folders that the ranks write to, by the setting that names them."""
        folders = self._spec.folders(self.section(self.carrier))
        return {f"kv_transfer.{self.carrier}.{field}": path for field, path in folders.items()}

    def environment(self, environ: Mapping[str, str], device: RankDevice) -> dict[str, str]:
        """Return what a rank's environment must hold before its connector is opened."""
        return self._spec.environment(self.section(self.carrier), environ, device)

    def network_environment(
        self, environ: Mapping[str, str], device: RankDevice, network: KVNetwork
    ) -> dict[str, str]:
        """Return what the environment of a rank with peers on other hosts must hold over that."""
        section = self.section(self.carrier)
        return self._spec.network_environment(section, environ, device, network)

    @property
    def _spec(self) -> ConnectorSpec[Any]:
        return _spec_of(self.carrier)


def _spec_of(name: str) -> ConnectorSpec[Any]:
    """Return a connector's spec; that of a connector without needs where it cannot be imported,
    which a rule of ``check-config`` reports.
    """
    try:
        return connector_spec(name)
    except ConnectorImportError:
        return NO_SPEC
