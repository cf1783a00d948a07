"""Rules that wait for what pdlaunch cannot do yet: what they will ask, and how that is said."""

import pytest

from pdlaunch.checks.network_rules import is_local_alone
from pdlaunch.checks.registry import all_rules
from pdlaunch.checks.ucx_rules import lacks_rdma
from tests.cli.test_explain import explain

WAITING = [rule for rule in all_rules().values() if rule.waits_for]


def test_what_needs_several_hosts_waits():
    assert [rule.code for rule in WAITING] == ["PD434"]


@pytest.mark.parametrize("rule", WAITING, ids=lambda rule: rule.code)
def test_its_page_says_that_it_finds_nothing_yet(rule):
    text = " ".join(explain(rule.code).stdout.split())
    assert f"Finds nothing yet: it waits for {rule.waits_for}" in text
    page = " ".join(explain("--markdown").stdout.split())
    assert f"Waits for: {rule.waits_for}" in page


def test_other_pages_have_no_such_line():
    assert "waits for" not in explain("PD433").stdout


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
