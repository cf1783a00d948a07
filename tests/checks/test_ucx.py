import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.checks.ucx import ALL, CUDA, RDMA, SHARED_MEMORY, common_transports, ucx_transports


@pytest.mark.parametrize(
    ("value", "transports"),
    [
        ("all", ALL),
        ("", ALL),
        ("sm,self", SHARED_MEMORY | {"self"}),
        ("^ib,cuda", ALL - RDMA - CUDA),
        (" rc , tcp ", {"rc_verbs", "rc_mlx5", "tcp"}),
        ("cuda_ipc", {"cuda_ipc"}),
        ("\\rc_verbs", {"rc_verbs"}),
        ("something_new", {"something_new"}),
    ],
)
def test_names_and_groups(value, transports):
    assert ucx_transports({"UCX_TLS": value}) == transports


def test_unset_is_all():
    assert ucx_transports({}) == ALL


def test_copies_inside_a_process_connect_nobody():
    assert not common_transports(frozenset({"self", "cuda_copy"}), ALL)


@given(st.text())
def test_any_text_is_read(value):
    assert isinstance(ucx_transports({"UCX_TLS": value}), frozenset)
