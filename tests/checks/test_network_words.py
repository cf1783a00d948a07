"""Words of the rules on hosts: addresses that others cannot ask, transports that leave RDMA out."""

import pytest

from pdlaunch.checks.network_rules import is_local_alone
from pdlaunch.checks.ucx_rules import lacks_rdma


@pytest.mark.parametrize(
    ("address", "is_local"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("localhost", True),
        ("0.0.0.0", True),
        ("::", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("node-7.cluster", False),
        ("fd00::7", False),
        ("::ffff:10.0.0.1", False),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_addresses_that_other_hosts_cannot_ask(address, is_local):
    assert is_local_alone(address) is is_local


@pytest.mark.parametrize(
    ("value", "lacks"),
    [("tcp,sm", True), ("^ib", True), ("rc", False), ("ib,sm", False), ("", False)],
)
def test_settings_without_rdma(value, lacks):
    assert lacks_rdma({"UCX_TLS": value}) is lacks
