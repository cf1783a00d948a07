"""Starts the process of a vLLM engine, with its command, environment and ports."""

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

import pdlaunch
from pdlaunch.config.http_names import is_loopback
from pdlaunch.config.model_files import weights
from pdlaunch.errors import ConfigError, PdlaunchError, StartupError
from pdlaunch.http.lifecycle import Supervised
from pdlaunch.machine.network import with_device_names
from pdlaunch.observe.causes import Cause, find_cause, last_lines
from pdlaunch.protocol.control import Address, Ready, Registry
from pdlaunch.protocol.engine_link import KV_SETUP, KVSetup, engine_of_rank
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.sockets import LaunchKeys

# Variables with network devices; addresses in their values are replaced by device names
_DEVICES = ("UCX_NET_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
# Flags of vLLM that may name files, and a pattern for the paths in their values
_FILE_FLAGS = {
    *("--tokenizer", "--chat-template", "--generation-config", "--hf-config-path"),
    *("--speculative-config", "--lora-modules"),
}
_PATH = re.compile(r'[^",={}\[\]]*/[^",={}\[\]]*')
EVENTS_FLAG = "--kv-events-config"
STOP_TIMEOUT_S = 5.0
SIDE_CHANNEL_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
_SIDE_CHANNEL_PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"
_PR_SET_PDEATHSIG = 1
_GUARD = "read _; kill -9 0"
_libc = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class SidecarOptions:
    """Holds the command of the engine that a sidecar starts, and the limits for watching it."""

    # If it has no fixed port, the sidecar adds a Unix socket to listen at.
    command: tuple[str, ...]
    is_exact: bool  # canaries compare tokens, not logprobs
    # An engine with work but no progress for this long is killed; 0: never. An engine without work
    # for this long gets a prompt of one token.
    hang_timeout_s: float
    unverified: str  # the reason why pulled KV blocks are used unproven; empty: they are proven

    @property
    def model(self) -> str:
        return self.value("--served-model-name")

    def model_files(self) -> dict[str, str]:
        """Return digests of the model's local files, and of others that flags name, by path."""
        folder = Path(self.command[2])  # vllm serve MODEL
        others: dict[str, str] = {}
        for path in self._named_paths():
            others |= weights.named_digests(path)
        if not folder.is_dir():
            return others | (weights.sampled_digests(folder) if folder.is_file() else {})
        try:
            digests = weights.weight_digests(folder, dummy=self.value("--load-format") == "dummy")
        except (ConfigError, OSError, ValueError):
            # VLLM reads formats that native engines do not.
            digests = weights.sampled_digests(folder)
        return others | digests | weights.text_digests(folder)

    def _named_paths(self) -> Iterator[Path]:
        """Yield the local files and folders that flags name, also in JSON and as NAME=PATH."""
        flag = ""
        for part in self.command:
            if part.startswith("--"):
                flag = part.partition(".")[0]  # ``--speculative-config.model`` is a part of JSON
            elif flag in _FILE_FLAGS:
                for text in {part, *_PATH.findall(part)}:
                    if os.path.exists(text):  # noqa: PTH110 - no error if it is too long
                        yield Path(text)

    @property
    def dp_size(self) -> int:
        return int(self.value("--data-parallel-size") or 1)

    @property
    def spans_hosts(self) -> bool:
        return "--nnodes" in self.command

    def value(self, flag: str) -> str:
        if flag not in self.command:
            return ""
        return self.command[self.command.index(flag) + 1]


# The process


async def read_pinned(options: SidecarOptions, bootstrap: Bootstrap) -> dict[str, str]:
    """Return the digests of the model's files. Raises ConfigError if the launch pinned others."""
    files = await asyncio.to_thread(options.model_files)
    weights.refuse_changes(bootstrap.pinned or files, files)
    return files


async def start_engine(
    command: Sequence[str], environment: Mapping[str, str]
) -> asyncio.subprocess.Process:
    """Start the command; ``environment`` overrides this process's variables. Raises StartupError.

    The engine stays in the sidecar's process group, so the supervisor's signals reach it, and it is
    killed when the supervisor reaps the sidecar. It writes to the sidecar's standard output.
    """
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            env={**os.environ, **environment},
            # The kernel sends the signal when the forking thread ends; this is the main thread,
            # which lives as long as the sidecar.
            preexec_fn=die_with_thread,
        )
    except OSError as error:
        raise StartupError(
            f"{command[0]} cannot be started: {os.strerror(error.errno or 0)}; set "
            "engine_command to the executable of vLLM, or put it on PATH"
        ) from None


async def stop_engine(process: asyncio.subprocess.Process) -> None:
    """Ask the engine to end; kill it if it does not end in time."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            return


def guard_group() -> subprocess.Popen[bytes]:
    """Start a process that kills this process's group as soon as this process is gone.

    A parent-death signal reaches only direct children: the engine's server would end, but not the
    processes that it has started, which compute and hold the memory.
    """
    assert os.getpgid(0) == os.getpid(), "it leads its own group"
    # The write end stays open as long as this process lives.
    read_end, _ = os.pipe()
    try:
        return subprocess.Popen(
            ("sh", "-c", _GUARD),
            stdin=read_end,
            stdout=subprocess.DEVNULL,
            # Before the shell runs: a ``trap`` of its own would come too late for an early signal.
            preexec_fn=_ignore_stops,
        )
    finally:
        os.close(read_end)


def _ignore_stops() -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def die_with_thread() -> None:
    """Make the kernel kill this process when the thread that forked it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# Command and environment of the engine


def with_events_at(command: tuple[str, ...], endpoint: str) -> tuple[str, ...]:
    """Return the command with KV events enabled and published at ``endpoint``.

    vLLM's default is a TCP port on all addresses. An endpoint set in the command is kept.
    ``endpoint``: ``ipc://`` and a path. Because ``inproc`` is in it, data parallel rank N appends
    ``_dpN``. Source: ZmqEventPublisher.offset_endpoint_port of vLLM 0.24 to 0.33.
    """
    config = {
        "enable_kv_cache_events": True,
        "endpoint": endpoint,
        "replay_endpoint": f"{endpoint}.replay",
    }
    if EVENTS_FLAG not in command:
        return (*command, EVENTS_FLAG, json.dumps(config))
    at = command.index(EVENTS_FLAG) + 1
    return (*command[:at], json.dumps(config | json.loads(command[at])), *command[at + 1 :])


def engine_environment(
    run_dir: Path, key: str | None, side_channel: socket.socket | None = None
) -> dict[str, str]:
    """Return the variables for an engine; ``side_channel`` holds a port. Raises StartupError."""
    try:
        # The supervisor sets addresses, because it does not know the device names of this host.
        devices = {
            name: with_device_names(value) for name in _DEVICES if (value := os.environ.get(name))
        }
    except LookupError as error:
        raise StartupError(str(error)) from None
    return {
        # Folder for sockets between the engine's processes; all users can open those in /tmp.
        "VLLM_RPC_BASE_PATH": str(run_dir),
        # Set even if empty: a VLLM_API_KEY of the user's shell would lock routers out.
        "VLLM_API_KEY": key or "",
        **devices,
        **({_SIDE_CHANNEL_PORT: str(side_channel.getsockname()[1])} if side_channel else {}),
    }


def hold_side_channel(host: str, ports: str) -> socket.socket:
    """Hold a port for the side channel of vLLM's own connector; return the holding socket. vLLM
    does not accept port 0 and waits without limit for a busy port. Raises StartupError.

    The engine listens there about a minute after its start. Until then, the socket keeps UCX, other
    engines and programs that ask for a free port from getting this one. ``ports``: first and last
    allowed port, ``21000-21999``; empty, or on loopback: any port.
    """
    wanted = [0]
    if ports and not is_loopback(host):
        first, _, last = ports.partition("-")
        found = range(int(first), int(last) + 1)
        # In random order, so that engines that start at the same time rarely try the same port.
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
        f"no port of {host} is free for the side channel of vLLM: {problem} "
        f"(kv_transfer.data_ports: {ports})"
    )


# pdlaunch's KV connector, which runs in the engine


def connector_environment(
    bootstrap: Bootstrap, link: str, files: Mapping[str, str]
) -> dict[str, str]:
    """Write the setup file that the connector reads at its start, with mode 0600; return the
    variables with paths of this file and of the connector's package.
    """
    assert bootstrap.connector is not None
    setup = KVSetup(
        **msgspec.structs.asdict(bootstrap.connector),
        name=engine_of_rank(bootstrap.name),
        incarnation=bootstrap.incarnation,
        keys=LaunchKeys(bootstrap.keys.public, bootstrap.keys.secret, http_token=""),
        link=link,
        model_digest=weights.model_digest(files),
    )
    path = _setup_path(bootstrap)
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        file.write(msgspec.json.encode(setup))
    # Use a folder with only pdlaunch: its site-packages may have versions that vLLM cannot use.
    packages = Path(bootstrap.run_dir) / "python"
    packages.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # several engines do this at the same time
        (packages / "pdlaunch").symlink_to(Path(pdlaunch.__file__).parent)
    paths = (str(packages), os.environ.get("PYTHONPATH"))
    return {KV_SETUP: str(path), "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def remove_setup(bootstrap: Bootstrap) -> None:
    """Remove the setup file, if it exists."""
    with contextlib.suppress(OSError):
        _setup_path(bootstrap).unlink()


def _setup_path(bootstrap: Bootstrap) -> Path:
    return Path(bootstrap.run_dir) / f"{bootstrap.name.replace('/', '.')}.kv.json"


# Output of the engine


class EngineOutput:
    """Finds the cause of an engine's end in its output, which is in this process's log."""

    def __init__(self, path: Path = Path("/proc/self/fd/1")) -> None:
        self._path, self._start = path, 0
        with contextlib.suppress(OSError):
            self._start = path.stat().st_size  # ignore the lines that are already there

    def cause(self) -> Cause | None:
        return find_cause(last_lines(self._path, self._start))


# Engines over hosts


class HeadlessNode:
    """Runs ranks of an engine on a further host: vLLM without a server.

    ::

        the engine's first sidecar registers its master port   ──> start vLLM
        the engine serves, so these ranks have read the model ──> Ready
    """

    def __init__(self, supervised: Supervised, options: SidecarOptions) -> None:
        self._supervised = supervised
        self._options = options
        self._first: asyncio.Future[Address] = asyncio.get_running_loop().create_future()
        self._serves = asyncio.Event()
        self._output = EngineOutput()

    async def run(self) -> None:
        """Run until Stop or a signal. Raises StartupError if vLLM ends by itself."""
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
        """Run vLLM; return the reason for its end. Raises StartupError, OSError."""
        options, bootstrap = self._options, self._supervised.bootstrap
        files = await read_pinned(options, bootstrap)
        first = await self._first
        environment = engine_environment(Path(bootstrap.run_dir), None)
        if bootstrap.connector is not None:
            environment |= connector_environment(bootstrap, first.link, files)
        port = ("--master-port", str(first.master_port))
        child = await start_engine((*options.command, *port), environment)
        end, serves = asyncio.create_task(child.wait()), asyncio.create_task(self._serves.wait())
        try:
            await asyncio.wait((end, serves), return_when=asyncio.FIRST_COMPLETED)
            if not end.done():
                if changed := weights.changes(files, await asyncio.to_thread(options.model_files)):
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
        """Do nothing: the first sidecar drains the engine."""


def end_of(options: SidecarOptions, code: int, output: EngineOutput) -> str:
    """Describe how an engine's process ended, with the cause if its output shows one."""
    name = Path(options.command[0]).name
    if code < 0:
        return f"{name} was killed by {signal.Signals(-code).name}"
    cause = output.cause()
    return f"{name} exited with status {code}" + (f": {cause.error}" if cause else "")
