"""Settings of a connector of another package: all that pdlaunch imports outside of the ranks."""

from pydantic import Field

from pdlaunch.config.connectors import ConnectorSettings
from pdlaunch.config.field_types import ByteSize


class ExampleSettings(ConnectorSettings):
    """The section ``kv_transfer.example``."""

    factory = "example_connector.connector:new_connector"

    max_read_bytes: ByteSize = Field(1 << 30, description="Longer READs are refused.")

    @property
    def joins_hosts(self) -> bool:
        """Processes of other hosts have no memory here."""
        return False
