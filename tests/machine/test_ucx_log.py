"""What UCX prints, and real processes that read over each transport of a CPU."""

import json
import os
from pathlib import Path

import pytest

from pdlaunch.cli.bench import run_module
from pdlaunch.machine.ucx_log import ReadTransports, path_over

HEAD = "[1795.2] [vm:7:0]   | remote memory {} by ucp_{}*(multi) into {} memory from host |\n"
ROW = "[1795.2] [vm:7:0]   | {} | {} | {} |\n"


def table(*rows: tuple[str, str, str], verb: str = "read", call: str = "get") -> str:
    title = HEAD.format(verb, call, "host") + ROW.format("Range", "Description", "Config")
    return title + "".join(ROW.format(*row) for row in rows)


@pytest.fixture
def stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the place of this process's standard output."""
    log = tmp_path / "log"
    log.write_text(table(("0..inf", "zero-copy", "of/another process")))
    monkeypatch.setattr("pdlaunch.machine.ucx_log._STDOUT", log)
    return log


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (("0..inf", "zero-copy", "cma/memory"), "cma"),
        (("0..inf", "zero-copy", "cuda_ipc/cuda"), "cuda_ipc"),
        (("0..inf", "software emulation", "tcp/lo"), "tcp, software emulation"),
        (("9..inf", "zero-copy", "52% on tcp/lo and 48% on tcp/eth0"), "tcp"),
        (("9..inf", "zero-copy", "rc_mlx5/mlx5_0:1/path0"), "rdma"),
        (("9..inf", "zero-copy", "50% on rc_verbs/a_0:1 and 50% on rc_verbs/a_1:1"), "rdma"),
    ],
)
def test_the_row_for_the_largest_reads_counts(
    stdout: Path, row: tuple[str, str, str], said: str
) -> None:
    transports = ReadTransports()
    assert transports.latest() == ""
    with stdout.open("a") as log:
        log.write(table(("0..8", "short", "self/memory"), row))
        log.write(table(("0..inf", "zero-copy", "put/memory"), verb="write", call="put"))
    assert transports.latest() == said
    with stdout.open("a") as log:
        log.write("other lines\n")
    assert transports.latest() == said


def test_of_ranks_that_share_a_log_the_one_without_a_direct_path_is_told(stdout: Path) -> None:
    transports = ReadTransports()
    emulated = ("0..inf", "software emulation", "tcp/lo")
    with stdout.open("a") as log:
        log.write(table(emulated) + table(("0..inf", "zero-copy", "cuda_ipc/cuda")))
    assert path_over("nixl/vLLM", transports.latest()) == "nixl/vLLM (tcp, software emulation)"


def test_nothing_is_known_where_output_does_not_go_to_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pdlaunch.machine.ucx_log._STDOUT", Path("/dev/null"))
    assert path_over("nixl/UCX", ReadTransports().latest()) == "nixl/UCX"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("tls", "said"), [("posix,cma,self", "cma"), ("posix,self", "posix, software emulation")]
)
def test_ucx_says_what_it_reads_over(tls: str, said: str) -> None:
    options = json.dumps({"kv_transfer": {"nixl": {"path": "nixl"}}, "num_layers": 1})
    environ = os.environ | {"UCX_TLS": tls}
    pair = json.loads(run_module("pdlaunch.bench.transfer", options, environ=environ))
    assert pair["path"] == f"nixl/UCX ({said})"
