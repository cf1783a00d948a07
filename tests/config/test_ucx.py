import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.config.ucx import (
    ALL,
    CUDA,
    RDMA,
    SHARED_MEMORY,
    leaves_out_shared_memory,
    local_transports,
    ucx_transports,
    unknown_transports,
)
from pdlaunch.config.ucx_variables import network_variables, unknown_variables


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
        ("\\sm,\\posix", {"sm", "posix"}),  # a transport of that name, not the group
        ("*", {"*"}),
        ("SM", {"SM"}),
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


@pytest.mark.parametrize(
    ("value", "unknown"),
    [
        ("", ()),
        ("all", ()),
        ("^tcp,ib", ()),
        ("rocm,ze_ipc,gga_mlx5,ud:aux", ()),
        ("\\posix", ()),
        ("\\sm", ("\\sm",)),
        ("tpc,sm,cuda_icp", ("tpc", "cuda_icp")),
        ("^posx", ("posx",)),
        ("posix,^cma", ("^cma",)),
        ("SM,*", ("SM", "*")),
    ],
)
def test_names_that_ucx_does_not_know(value, unknown):
    assert unknown_transports({"UCX_TLS": value}) == unknown


@given(st.text())
def test_any_text_is_read(value):
    environ = {"UCX_TLS": value, "UCX_SHM_DEVICES": value}
    assert isinstance(ucx_transports(environ), frozenset)
    assert all(name in value for name in unknown_transports(environ))
    assert isinstance(leaves_out_shared_memory(environ), bool)


@pytest.mark.parametrize(
    ("value", "left_out"),
    [
        ("", False),
        ("all", False),
        ("memory", False),
        ("foo,memory", False),
        ("^foo", False),
        ("foo", True),
        ("^memory", True),
        ("^foo,memory", True),
    ],
)
def test_devices_of_shared_memory(value, left_out):
    assert leaves_out_shared_memory({"UCX_SHM_DEVICES": value}) is left_out


def test_variables_are_known_by_name_or_by_their_transport():
    environ = dict.fromkeys(
        ("UCX_TLS", "UCX_TSL", "UCX_IB_GID_INDEX", "UCX_RC_MLX5_TIMEOUT", "UCX_NET_DEVICE", "PATH"),
        "",
    )
    assert list(unknown_variables(environ)) == ["UCX_TSL", "UCX_NET_DEVICE"]
    assert list(network_variables(environ)) == ["UCX_IB_GID_INDEX", "UCX_RC_MLX5_TIMEOUT"]
