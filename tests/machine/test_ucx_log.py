"""What UCX prints, and real processes that read over each transport of a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdlaunch.machine.ucx_log import ReadTransports, path_over

ROOT = Path(__file__).parents[2]
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


HOLDER = """
import sys, torch
from pathlib import Path
from pdlaunch.transfer.connectors.nixl import load_nixl, new_agent
agent = new_agent(*load_nixl(), "holder", 100_000)
memory = torch.full((1 << 20,), 7, dtype=torch.uint8)
registered = agent.register_memory(memory)
Path(sys.argv[1]).write_bytes(agent.get_agent_metadata())
print(memory.data_ptr(), flush=True)
sys.stdin.readline()
"""
READER = """
import os, sys, torch, numpy
from pathlib import Path
from pdlaunch.machine.ucx_log import ReadTransports
from pdlaunch.transfer.connectors.nixl import load_nixl, new_agent
agent, transports = new_agent(*load_nixl(), "reader", 100_000), ReadTransports()
memory = torch.zeros(1 << 20, dtype=torch.uint8)
registered = agent.register_memory(memory)
agent.add_remote_agent(Path(sys.argv[1]).read_bytes())
rows = [numpy.array([[at, 1 << 20, 0]]) for at in (memory.data_ptr(), int(sys.argv[2]))]
ours, theirs = (agent.get_xfer_descs(each, "DRAM") for each in rows)
handle = agent.initialize_xfer("READ", ours, theirs, "holder")
state = agent.transfer(handle)
while state == "PROC":
    state = agent.check_xfer_state(handle)
print(state, int(memory.min()), transports.latest(), sep=";", file=sys.stderr, flush=True)
os._exit(0)
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("tls", "said"),
    [
        ("posix,cma,self", "cma"),
        ("posix,self", "posix, software emulation"),
        ("tcp,self", "tcp, software emulation"),
    ],
)
def test_ucx_says_what_it_reads_over(tmp_path: Path, tls: str, said: str) -> None:
    environ = os.environ | {
        "UCX_TLS": tls,
        "UCX_MODULES": "^ib",
        "UCX_PROTO_INFO": "*memory read*",
        "NIXL_LOG_LEVEL": "ERROR",
        "PYTHONPATH": str(ROOT),
    }
    metadata = str(tmp_path / "metadata")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, metadata], env=environ, **pipes) as holder:
        assert holder.stdout is not None
        lines = iter(holder.stdout)
        address = next(line for line in lines if line.strip().isdigit()).decode().strip()
        with (tmp_path / "log").open("ab") as log:
            told = subprocess.run(
                [sys.executable, "-c", READER, metadata, address],
                env=environ,
                stdout=log,
                stderr=subprocess.PIPE,
                text=True,
                check=True,
            )
        holder.kill()
    assert told.stderr.splitlines()[-1] == f"DONE;7;{said}"
