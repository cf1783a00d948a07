import pytest
from pydantic import ValidationError

from pdlaunch.config.connectors import (
    ALL,
    CUDA,
    RDMA,
    SHARED_MEMORY,
    TCP,
    KVNetwork,
    local_transports,
    network_transports,
    ucx_transports,
)
from pdlaunch.config.kv_transfer import KVTransferSettings


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


@pytest.mark.parametrize(
    ("value", "cpu", "cuda"),
    [
        ("", "posix,cma,self", "cuda_ipc,cuda_copy,posix,cma,self"),
        ("all", "posix,cma,self", "cuda_ipc,cuda_copy,posix,cma,self"),
        ("tcp,sm,self", "posix,cma,self", "posix,cma,self"),
        ("^cma", "posix,self", "cuda_ipc,cuda_copy,posix,self"),
        ("cuda,posix", "posix", "cuda_ipc,cuda_copy,posix"),
        ("cuda_ipc,cuda_copy,tcp", "posix,cma,self", "cuda_ipc,cuda_copy,posix,cma,self"),
        ("sysv,knem,rc", "posix,cma,self", "posix,cma,self"),
        ("^cuda_ipc,posix", "posix,cma,self", "cuda_copy,posix,cma,self"),
    ],
)
def test_nothing_that_listens_or_admits_others_is_used(value, cpu, cuda):
    assert ",".join(local_transports({"UCX_TLS": value}, "cpu")) == cpu
    assert ",".join(local_transports({"UCX_TLS": value}, "cuda")) == cuda


@pytest.mark.parametrize(
    ("value", "tcp_alone", "with_rdma"),
    [
        ("all", ("tcp",), ("rc_mlx5", "rc_verbs", "tcp")),
        ("tcp,sm", ("tcp",), ("tcp",)),
        ("rc,sm", (), ("rc_mlx5", "rc_verbs")),
        ("^tcp", (), ("rc_mlx5", "rc_verbs")),
        ("sm", (), ()),
    ],
)
def test_transports_between_hosts(value, tcp_alone, with_rdma):
    environ = {"UCX_TLS": value}
    assert network_transports(environ, has_rdma=False) == tcp_alone
    assert network_transports(environ, has_rdma=True) == with_rdma


def of_rank(environ, *rdma_devices):
    settings, network = KVTransferSettings(), KVNetwork("10.0.0.7", "21000-21999", rdma_devices)
    carrier = settings.connector_section
    alone = ucx_transports(carrier.environment(environ, "cpu"))
    assert not alone & (TCP | RDMA)
    return carrier.environment(environ, "cpu", network)


def test_ranks_with_peers_elsewhere_use_one_device_and_known_ports():
    found = of_rank({})
    assert found["UCX_TLS"] == "tcp,posix,cma,self"
    assert found["UCX_NET_DEVICES"] == "10.0.0.7"
    assert found["UCX_TCP_PORT_RANGE"] == "21000-21999"
    assert found["UCX_MODULES"] == "^ib"
    found = of_rank({}, "mlx5_0", "mlx5_1")
    assert found["UCX_TLS"] == "rc_mlx5,rc_verbs,tcp,posix,cma,self"
    assert found["UCX_NET_DEVICES"] == "10.0.0.7,mlx5_0:1,mlx5_1:1"
    assert found["UCX_MODULES"] == "*"
    assert of_rank({"UCX_NET_DEVICES": "eth7"})["UCX_NET_DEVICES"] == "eth7"


@pytest.mark.parametrize(
    "value", ["21000", "a-b", "0-100", "500-1000", "30000-20000", "9000-9003", "-1-5"]
)
def test_ranges_of_ports_that_are_none(value):
    with pytest.raises(ValidationError, match=r"port range|lower port first|fewer than"):
        KVTransferSettings(data_ports=value)


def test_vllms_own_connector_has_no_section_and_is_narrowed_between_hosts_alone() -> None:
    settings = KVTransferSettings(connector="vllm-nixl")
    assert settings.is_stock
    prints = {"UCX_PROTO_INFO": "*memory read*"}
    assert settings.connector_section.environment({}, "cpu") == prints
    assert settings.connector_section.environment({"UCX_PROTO_INFO": "y"}, "cpu") != prints
    network = KVNetwork("10.0.0.2", "21000-21999")
    assert settings.connector_section.environment({}, "cpu", network)["UCX_TLS"].startswith("tcp,")
    with pytest.raises(ValidationError, match="vllm-nixl"):
        KVTransferSettings.model_validate({"vllm-nixl": {}})
