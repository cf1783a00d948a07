"""Settings of a connector in another package. Only ranks import the rest of the package."""

from pydantic import Field

from pdlaunch.config.connectors import ConnectorSettings
from pdlaunch.config.field_types import ByteSize


class ExampleSettings(ConnectorSettings):
    """The section ``kv_transfer.example``."""

    factory = "example_connector.connector:new_connector"

    max_read_bytes: ByteSize = Field(1 << 30, description="Longer READs are refused.")

    @property
    def joins_hosts(self) -> bool:
        """Return False: the connector cannot read the memory of other hosts."""
        return False
