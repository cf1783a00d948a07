"""Another user of this machine can neither read nor write the memory of ranks that transfer KV
blocks.
"""

from __future__ import annotations

import ctypes
import encodings.idna  # noqa: F401 - sockets need it, and another user cannot import it
import errno
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from tests.transfer.conftest import Start
from tests.transfer.rank_process import RankHandle

NOBODY = 65534
NUM_BYTES = 16
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
]


@pytest.fixture(params=["nixl", "p2p", "auto"])
def pair(request: pytest.FixtureRequest, start: Start) -> tuple[RankHandle, RankHandle]:
    transfer = {"nixl": {"path": request.param}}
    holder, puller = (start(role, transfer=transfer) for role in ("prefill", "decode"))
    puller.connect(holder)
    return holder, puller


def as_nobody(act: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Run ``act`` in a process of another user; return its result."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            answer = act()
        except BaseException as error:
            answer = {"failed": repr(error)}
        finally:
            os.write(writing, msgspec.json.encode(answer))
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return msgspec.json.decode(answer, type=dict[str, str])


class IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def touch_memory(call: str, pid: int, address: int) -> str:
    """Call ``process_vm_readv`` or ``process_vm_writev``, as CMA does. Return the name of its
    error, or "".
    """
    content = ctypes.create_string_buffer(b"x" * NUM_BYTES, NUM_BYTES)
    here = IoVec(ctypes.cast(content, ctypes.c_void_p), NUM_BYTES)
    there = IoVec(address, NUM_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    moved = getattr(libc, call)(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    return "" if moved >= 0 else errno.errorcode[ctypes.get_errno()]


def open_files(pid: int, names: list[str]) -> str:
    """Open these files of a process; return the names of the errors, "" for a file that opens."""
    errors = set()
    for name in names:
        try:
            with open(f"/proc/{pid}/{name}", "rb"):  # noqa: PTH123 - as plain as it gets
                errors.add("")
        except OSError as error:
            errors.add(errno.errorcode[error.errno or 0])
    return ",".join(sorted(errors))


def connect_to_unix(path: str) -> str:
    """Send a wrong token of 32 bytes to a Unix socket. Return a description of the answer, or "" if
    none comes.
    """
    try:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(20)
            stranger.connect(path.replace("@", "\0", 1))
            stranger.sendall(bytes(32))
            _, descriptors, _, _ = socket.recv_fds(stranger, 65536, 16)
            return f"{len(descriptors)} descriptors" if descriptors else ""
    except OSError:
        return ""


def attack(pid: int, address: int, names: list[str], unix: list[str]) -> dict[str, str]:
    return {
        "read": touch_memory("process_vm_readv", pid, address),
        "write": touch_memory("process_vm_writev", pid, address),
        "files": open_files(pid, names),
        **{f"unix {path}": connect_to_unix(path) for path in unix},
    }


def test_another_user_can_neither_read_nor_write(pair: tuple[RankHandle, RankHandle]) -> None:
    holder, puller = pair
    for rank in pair:
        pid, address = rank.call("address")
        _, unix = rank.call("listening")
        before = rank.call("digest", False)
        names = ["mem", "maps", *(f"fd/{fd.name}" for fd in Path(f"/proc/{pid}/fd").iterdir())]
        found = as_nobody(partial(attack, pid, address, names, unix))
        refused = {"read": "EPERM", "write": "EPERM", "files": "EACCES"}
        assert {name: found.get(name, found) for name in refused} == refused
        assert {answer for name, answer in found.items() if name.startswith("unix")} <= {""}
        assert rank.call("digest", False) == before
    puller.pull_from(holder, "the ranks go on as if nothing had happened")


def test_this_user_can(pair: tuple[RankHandle, RankHandle]) -> None:
    """The attack itself works for the same user."""
    pid, address = pair[0].call("address")
    assert touch_memory("process_vm_readv", pid, address) == ""
    assert open_files(pid, ["maps"]) == ""
