"""Starts the process of an engine of vLLM, with its command, environment and ports."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import random
import re
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pdlaunch
from pdlaunch.config.engine_spec import ENGINE_HOST
from pdlaunch.config.http_names import is_loopback
from pdlaunch.errors import StartupError
from pdlaunch.machine.network import with_device_names
from pdlaunch.protocol.engine_link import KV_SETUP

EVENTS_FLAG = "--kv-events-config"
STOP_TIMEOUT_S = 5.0
_ERROR = re.compile(r"(?:\b[A-Z]\w*(?:Error|Exception)|\berror): \S.*")
_POINTS_UP = "root cause"  # vLLM's last errors only say that the reason stands above
_MAX_TAIL_BYTES = 256 * 1024
_SIDE_CHANNEL_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
_SIDE_CHANNEL_PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"
_DEVICES = "UCX_NET_DEVICES"
_PR_SET_PDEATHSIG = 1
_GUARD = "trap '' HUP INT TERM; read _; kill -9 0"
_libc = ctypes.CDLL(None)


# The process


async def start_engine(
    command: Sequence[str], environment: Mapping[str, str]
) -> asyncio.subprocess.Process:
    """Start the command; ``environment`` goes over this process's. Raises StartupError.

    It stays in the process group of the sidecar, so that the supervisor's signals reach it and
    nothing of it is left when the sidecar is buried. Its output goes where the sidecar's goes.
    """
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            env={**os.environ, **environment},
            # Forked by the main thread, which lives as long as the sidecar: the kernel sends the
            # signal when that thread ends.
            preexec_fn=die_with_thread,
        )
    except OSError as error:
        raise StartupError(
            f"{command[0]} cannot be started: {os.strerror(error.errno or 0)}; set "
            "engine_command to the executable of vLLM, or put it on PATH"
        ) from None


async def stop_engine(process: asyncio.subprocess.Process) -> None:
    """Ask the engine to end; kill it when it has not in time."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            return


def guard_group() -> subprocess.Popen[bytes]:
    """Have all processes of this one's group killed as soon as this one is gone.

    A signal at a parent's death reaches children alone: the server of an engine would go, and the
    processes that it has started, which compute and hold the memory, would stay.
    """
    assert os.getpgid(0) == os.getpid(), "it leads its own group"
    # The other end is open for as long as this process lives.
    read_end, _ = os.pipe()
    try:
        return subprocess.Popen(("sh", "-c", _GUARD), stdin=read_end, stdout=subprocess.DEVNULL)
    finally:
        os.close(read_end)


def die_with_thread() -> None:
    """Have the kernel kill this process when the thread that has forked it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# Its command and environment


def with_events_at(command: tuple[str, ...], endpoint: str) -> tuple[str, ...]:
    """Return the command with KV events published at ``endpoint``, where it asks for events.

    vLLM's own default is a TCP port on every address. A command that names an endpoint keeps it.
    """
    if EVENTS_FLAG not in command:
        return command
    at = command.index(EVENTS_FLAG) + 1
    config = {"endpoint": endpoint, **json.loads(command[at])}
    return (*command[:at], json.dumps(config), *command[at + 1 :])


def engine_environment(
    run_dir: Path, key: str | None, side_channel: socket.socket | None = None
) -> dict[str, str]:
    """Return the variables of an engine. Raises StartupError.

    ``side_channel``: the port that is held for vLLM's own connector.
    """
    try:
        # The supervisor knows no more than this host's address.
        devices = with_device_names(os.environ.get(_DEVICES, ""))
    except LookupError as error:
        raise StartupError(str(error)) from None
    return {
        # The sockets between the engine's own processes: anybody may open those in /tmp.
        "VLLM_RPC_BASE_PATH": str(run_dir),
        # Empty overrides a VLLM_API_KEY of the user's shell, which would keep routers out.
        "VLLM_API_KEY": key or "",
        **({_DEVICES: devices} if devices else {}),
        **({_SIDE_CHANNEL_PORT: str(side_channel.getsockname()[1])} if side_channel else {}),
    }


def side_channel_host() -> str:
    """Return the address at which other engines reach the side channel of vLLM's own connector."""
    return os.environ.get(_SIDE_CHANNEL_HOST, ENGINE_HOST)


def hold_side_channel(host: str, ports: str) -> socket.socket:
    """Keep a port for the side channel of vLLM's own connector, which takes no port 0 and would
    wait for one that is busy for ever. Raises StartupError.

    The engine listens there a minute after its start. The socket keeps others from taking the port:
    UCX, other engines, any program that asks for a free port.

    ``ports``: first and last allowed port, ``21000-21999``; empty, or on loopback: any port.
    """
    wanted = [0]
    if ports and not is_loopback(host):
        first, _, last = ports.partition("-")
        found = range(int(first), int(last) + 1)
        # Two engines that start at the same time look at other ones first.
        wanted = random.SystemRandom().sample(found, len(found))
    problem = "there is none"
    for port in wanted:
        holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            # Bind without SO_REUSEADDR, so as not to share the port of another holder. Set it then:
            # the engine's socket has it too, and may listen because this one does not.
            holder.bind((host, port))
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        except OSError as error:
            holder.close()
            problem = error.strerror or str(error)
            continue
        return holder
    raise StartupError(
        f"no port {ports} of {host} can be had for the side channel of vLLM: {problem} "
        "(kv_transfer.data_ports)"
    )


# pdlaunch's KV connector, which runs in the engine


def connector_environment(run_dir: Path, setup: Path, python_path: str) -> dict[str, str]:
    """Return the variables with which an engine finds the connector, and the connector its setup.

    ``python_path``: the PYTHONPATH so far. Engines of one launch call this at the same time.
    """
    # The folder that pdlaunch is installed in has packages of other versions than vLLM needs.
    packages = run_dir / "python"
    packages.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (packages / "pdlaunch").symlink_to(Path(pdlaunch.__file__).parent)
    return {
        KV_SETUP: str(setup),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(packages), python_path))),
    }


# What it prints


class EngineOutput:
    """Finds the reason for an engine's end in what it has printed into this process's log."""

    def __init__(self, path: Path = Path("/proc/self/fd/1")) -> None:
        """Skip the lines that the file already has."""
        self._path = path
        self._start = self._num_bytes()

    def last_error(self) -> str:
        """Return the last error that the engine has told; empty: none is found."""
        start = max(self._start, self._num_bytes() - _MAX_TAIL_BYTES)
        try:
            with self._path.open("rb") as log:
                log.seek(start)
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:  # a pipe, or a terminal
            return ""
        found = (_ERROR.search(line) for line in reversed(lines) if _POINTS_UP not in line)
        return next((match[0] for match in found if match), "")

    def _num_bytes(self) -> int:
        with contextlib.suppress(OSError):
            return self._path.stat().st_size
        return 0
