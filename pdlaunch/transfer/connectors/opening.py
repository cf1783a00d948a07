"""Makes the connector that the configuration names; no other one is imported."""

from __future__ import annotations

from pdlaunch.config.connectors import connector_spec, load_named
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import ConfigError
from pdlaunch.transfer.connectors.connector import Connector


def new_connector(settings: KVTransferSettings, name: str, incarnation: int) -> Connector:
    """Make the connector of a rank (``prefill-0/rank-0``). Raises ConfigError."""
    what = f"connector {settings.connector}"
    factory = load_named(connector_spec(settings.connector).factory, what)
    connector = factory(settings, name, incarnation)
    if not isinstance(connector, Connector):
        raise ConfigError(f"{what}: {type(connector).__name__} is no Connector")
    return connector
