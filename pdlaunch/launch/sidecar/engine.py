"""Starts the process of an engine of vLLM, with its command, environment and ports."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import random
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

EVENTS_FLAG = "--kv-events-config"
STOP_TIMEOUT_S = 5.0
# As ``pdlaunch.vllm.far_statements`` has it, which imports numpy.
STATEMENTS_SOCKET = "PDLAUNCH_STATEMENTS_SOCKET"
_SIDE_CHANNEL_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
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
    run_dir: Path, key: str | None, side_channel: socket.socket
) -> dict[str, str]:
    """Return the variables of an engine. Raises StartupError."""
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
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel.getsockname()[1]),
        **({_DEVICES: devices} if devices else {}),
    }


def side_channel_host() -> str:
    """Return the address at which other engines reach this one's side channel."""
    return os.environ.get(_SIDE_CHANNEL_HOST, ENGINE_HOST)


def hold_side_channel(host: str, ports: str) -> socket.socket:
    """Keep a port for the side channel of an engine, which takes no port 0 and would wait for one
    that is busy for ever. Raises StartupError.

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


def statements_folder(run_dir: Path) -> Path:
    """Return the folder with the statements of this host's engines about their KV blocks."""
    return run_dir / "kv-statements"


def statements_socket(run_dir: Path, name: str) -> Path:
    """Return the socket at which an engine asks for statements from other hosts."""
    return run_dir / f"{name}.statements"


def connector_environment(
    run_dir: Path, name: str, python_path: str, *, is_far: bool = False
) -> dict[str, str]:
    """Return the variables with which an engine finds the connector, and engines each other's
    statements; what they name is made in the launch's folder.

    ``python_path``: the PYTHONPATH so far. ``is_far``: other engines may be on other hosts. Engines
    of one launch call this at the same time.
    """
    statements_folder(run_dir).mkdir(mode=0o700, exist_ok=True)
    # The folder that pdlaunch is installed in has packages of other versions than vLLM needs.
    packages = run_dir / "python"
    packages.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (packages / "pdlaunch").symlink_to(Path(pdlaunch.__file__).parent)
    found = {
        "PDLAUNCH_STATEMENTS_DIR": str(statements_folder(run_dir)),
        "PDLAUNCH_FAILURES_FILE": str(run_dir / f"{name}.failures"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(packages), python_path))),
    }
    if is_far:
        found[STATEMENTS_SOCKET] = str(statements_socket(run_dir, name))
    return found


class Failures:
    """Reads the file in which an engine's connector lists failed READs by peer."""

    def __init__(self, run_dir: Path, name: str) -> None:
        """Begin a new file."""
        self._path = run_dir / f"{name}.failures"
        self._path.unlink(missing_ok=True)
        self._offset = 0

    def latest(self) -> list[str]:
        """Return the ids of the engines, one for each failure since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                # The last line may be half written.
                lines, end, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._offset += len(lines) + len(end)
        return lines.decode(errors="replace").splitlines()
