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
from dataclasses import dataclass
from pathlib import Path

import pdlaunch
from pdlaunch.config.engine_spec import ENGINE_HOST
from pdlaunch.config.http_names import is_loopback
from pdlaunch.config.model_files.identity import (
    changes,
    model_digest,
    sampled_digests,
    text_digests,
    weight_digests,
)
from pdlaunch.errors import ConfigError, PdlaunchError, StartupError
from pdlaunch.http.lifecycle import Supervised
from pdlaunch.launch.sidecar.link import remove_setup, write_setup
from pdlaunch.machine.network import with_device_names
from pdlaunch.observe.causes import Cause, find_cause
from pdlaunch.protocol.control import Address, Ready, Registry
from pdlaunch.protocol.engine_link import KV_SETUP, engine_of_rank

# Variables that name network devices; addresses among them become names
_DEVICES = ("UCX_NET_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
EVENTS_FLAG = "--kv-events-config"
STOP_TIMEOUT_S = 5.0
_MAX_TAIL_BYTES = 256 * 1024
_SIDE_CHANNEL_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
_SIDE_CHANNEL_PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"
_PR_SET_PDEATHSIG = 1
_GUARD = "trap '' HUP INT TERM; read _; kill -9 0"
_libc = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class SidecarOptions:
    """The command of the engine that a sidecar starts, and how to judge the engine."""

    # Without a fixed port, the sidecar adds the socket to listen at.
    command: tuple[str, ...]
    is_exact: bool
    # An engine with work but no progress for this long is killed; 0: never. An engine without work
    # for this long is sent a prompt of one token.
    hang_timeout_s: float
    unverified: str  # why pulled KV blocks are used unproven

    @property
    def model(self) -> str:
        return self.value("--served-model-name")

    def model_files(self) -> dict[str, str]:
        """Return digests of the model's files, by name; empty if vLLM downloads the model."""
        folder = Path(self.command[2])  # vllm serve MODEL
        if not folder.is_dir():
            return sampled_digests(folder) if folder.is_file() else {}
        try:
            weights = weight_digests(folder, dummy=self.value("--load-format") == "dummy")
        except (ConfigError, OSError, ValueError):
            weights = sampled_digests(folder)  # vLLM takes other formats than native engines
        return weights | text_digests(folder)

    @property
    def spans_hosts(self) -> bool:
        return "--nnodes" in self.command

    def value(self, flag: str) -> str:
        """Return the value of a flag in the command; empty: the flag is absent."""
        if flag not in self.command:
            return ""
        return self.command[self.command.index(flag) + 1]


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
    """Return the command with KV events published at ``endpoint``, for routers and others.

    vLLM's own default is a TCP port on every address. A command that names an endpoint keeps it.
    """
    config = {
        "enable_kv_cache_events": True,
        "endpoint": endpoint,
        "replay_endpoint": f"{endpoint}.replay",
    }
    # vLLM publishes events of data parallel ranks only at open TCP ports (PD637).
    off = {"enable_kv_cache_events": False} if "--data-parallel-size" in command else {}
    if EVENTS_FLAG not in command:
        return (*command, EVENTS_FLAG, json.dumps(config | off))
    at = command.index(EVENTS_FLAG) + 1
    return (*command[:at], json.dumps(config | json.loads(command[at]) | off), *command[at + 1 :])


def engine_environment(
    run_dir: Path, key: str | None, side_channel: socket.socket | None = None
) -> dict[str, str]:
    """Return the variables of an engine. Raises StartupError.

    ``side_channel``: the port that is held for vLLM's own connector.
    """
    try:
        # The supervisor knows no more than this host's address.
        devices = {
            name: with_device_names(value) for name in _DEVICES if (value := os.environ.get(name))
        }
    except LookupError as error:
        raise StartupError(str(error)) from None
    return {
        # The sockets between the engine's own processes: anybody may open those in /tmp.
        "VLLM_RPC_BASE_PATH": str(run_dir),
        # Empty overrides a VLLM_API_KEY of the user's shell, which would keep routers out.
        "VLLM_API_KEY": key or "",
        **devices,
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

    def cause(self) -> Cause | None:
        """Return the error that ended the engine; None: none is found."""
        start = max(self._start, self._num_bytes() - _MAX_TAIL_BYTES)
        try:
            with self._path.open("rb") as log:
                log.seek(start)
                return find_cause(log.read().decode(errors="replace").splitlines())
        except OSError:  # a pipe, or a terminal
            return None

    def _num_bytes(self) -> int:
        with contextlib.suppress(OSError):
            return self._path.stat().st_size
        return 0


# Engines over hosts


class HeadlessNode:
    """Runs ranks of an engine on a further host: vLLM without a server.

    ::

        the engine's first sidecar registers where ranks meet ──> start vLLM
        the engine serves, so these ranks have read the model ──> Ready
    """

    def __init__(self, supervised: Supervised, options: SidecarOptions) -> None:
        self._supervised = supervised
        self._options = options
        self._first: asyncio.Future[Address] = asyncio.get_running_loop().create_future()
        self._serves = asyncio.Event()
        self._output = EngineOutput()

    async def run(self) -> None:
        """Run until Stop or a signal. Raises StartupError when vLLM ends by itself."""
        self._supervised.register(Address())
        running = self._supervised.spawn(self._watch_vllm())
        try:
            await self._supervised.obey(self._learn, self._drain)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            remove_setup(self._supervised.bootstrap)

    async def _watch_vllm(self) -> None:
        try:
            error = StartupError(await self._run_vllm())
        except (PdlaunchError, OSError) as found:
            error = StartupError(str(found))
        self._supervised.inbox.put_nowait(error)

    async def _run_vllm(self) -> str:
        """Run vLLM; return why it has ended. Raises StartupError, OSError."""
        options, bootstrap = self._options, self._supervised.bootstrap
        files = await asyncio.to_thread(options.model_files)
        first, run_dir = await self._first, Path(bootstrap.run_dir)
        environment = engine_environment(run_dir, None)
        if bootstrap.connector is not None:
            digest = model_digest(files) if files else ""
            setup = write_setup(bootstrap, bootstrap.connector, first.link, digest)
            python_path = os.environ.get("PYTHONPATH", "")
            environment |= connector_environment(run_dir, setup, python_path)
        port = ("--master-port", str(first.master_port))
        child = await start_engine((*options.command, *port), environment)
        end, serves = asyncio.create_task(child.wait()), asyncio.create_task(self._serves.wait())
        try:
            await asyncio.wait((end, serves), return_when=asyncio.FIRST_COMPLETED)
            if not end.done():
                if changed := changes(files, await asyncio.to_thread(options.model_files)):
                    return f"the model has changed while vLLM was starting: {changed}"
                self._supervised.send(Ready(model=files))
            return end_of(options, await end, self._output)
        finally:
            serves.cancel()
            end.cancel()
            await stop_engine(child)

    async def _learn(self, registry: Registry) -> None:
        own = self._supervised.bootstrap
        first = engine_of_rank(own.name), own.incarnation
        for entry in registry.entries:
            if (entry.name, entry.incarnation) != first:
                continue
            if entry.address.master_port and not self._first.done():
                self._first.set_result(entry.address)
            if entry.state != "starting":
                self._serves.set()

    async def _drain(self, _: float) -> None:
        """Do nothing: the first sidecar has the requests."""


def end_of(options: SidecarOptions, code: int, output: EngineOutput) -> str:
    """Return how an engine's process has ended, and the cause if its output names one."""
    name = Path(options.command[0]).name
    if code < 0:
        return f"{name} was killed by {signal.Signals(-code).name}"
    cause = output.cause()
    return f"{name} exited with status {code}" + (f": {cause.error}" if cause else "")
