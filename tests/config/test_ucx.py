import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.config.ucx import ALL, CUDA, RDMA, SHARED_MEMORY, local_transports, ucx_transports


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


@pytest.mark.parametrize(
    ("value", "cpu", "cuda"),
    [
        ("", "posix,cma,self", "cuda_ipc,cuda_copy,posix,cma,self"),
        ("all", "posix,cma,self", "cuda_ipc,cuda_copy,posix,cma,self"),
        ("tcp,sm,self", "posix,cma,self", "posix,cma,self"),
        ("^cma", "posix,self", "cuda_ipc,cuda_copy,posix,self"),
        ("cuda,posix", "posix", "cuda_ipc,cuda_copy,posix"),
        ("tcp", "", ""),
        ("sysv,knem,rc", "", ""),
    ],
)
def test_nothing_that_listens_or_admits_others_is_used(value, cpu, cuda):
    assert ",".join(local_transports({"UCX_TLS": value}, "cpu")) == cpu
    assert ",".join(local_transports({"UCX_TLS": value}, "cuda")) == cuda


@given(st.text())
def test_any_text_is_read(value):
    assert isinstance(ucx_transports({"UCX_TLS": value}), frozenset)
