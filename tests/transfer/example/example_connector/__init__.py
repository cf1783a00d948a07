"""The spec of a connector of another package: all that pdlaunch imports outside of the ranks."""

from pydantic import Field

from pdlaunch.config.connectors import ConnectorSpec
from pdlaunch.config.field_types import ByteSize, FrozenModel


class ExampleSettings(FrozenModel):
    """The section ``kv_transfer.example``."""

    max_read_bytes: ByteSize = Field(1 << 30, description="Longer READs are refused.")


class ExampleSpec(ConnectorSpec[ExampleSettings]):
    factory = "example_connector.connector:new_connector"
    settings = ExampleSettings

    def joins_hosts(self, section: ExampleSettings) -> bool:
        """Processes of other hosts have no memory here."""
        return False


SPEC = ExampleSpec()
