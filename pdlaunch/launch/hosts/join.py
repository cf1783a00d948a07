"""Writes and reads join files, with which agents join a launch: the supervisor's endpoint and keys.

::

    join file (0600)            server's public key, the agents' key pair
    join file + .supervisor     both key pairs and the port, for a killed supervisor's successor

CURVE authenticates both sides: only the supervisor has the server's secret key, and only holders of
the join file have the agents' secret key. These keys belong to one launch. They are not its ZMQ key
pair, which an agent gets with each process to start.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import zmq

from pdlaunch.errors import ConfigError
from pdlaunch.launch.hosts.agent_messages import Join
from pdlaunch.planning.plan import ResolvedHost
from pdlaunch.protocol.process.run_dirs import take_lock
from pdlaunch.protocol.sockets import LaunchKeys

_MOST_BYTES = 64 * 1024


class JoinTicket(msgspec.Struct, frozen=True, kw_only=True):
    endpoint: str  # ``tcp://10.0.0.1:5555``
    server_public: str
    keys: LaunchKeys  # of the agents


class JoinKeys(msgspec.Struct, frozen=True, kw_only=True):
    server: LaunchKeys
    agents: LaunchKeys
    port: int = 0  # port of the supervisor; 0: any

    def ticket(self, endpoint: str) -> JoinTicket:
        server_public = self.server.public
        return JoinTicket(endpoint=endpoint, server_public=server_public, keys=self.agents)


def new_join_keys(port: int = 0) -> JoinKeys:
    """Generate the join keys of one launch, whose supervisor listens at ``port`` (0: any)."""
    return JoinKeys(server=new_keys(), agents=new_keys(), port=port)


def new_keys() -> LaunchKeys:
    """Generate a CURVE key pair."""
    public, secret = zmq.curve_keypair()
    return LaunchKeys(public.decode(), secret.decode(), http_token="")


@contextlib.contextmanager
def held_join_file(path: Path, port: int = 0) -> Iterator[JoinKeys]:
    """Lock the join file for one supervisor. Raises ConfigError if another one has locked it.

    Yield the keys that a killed supervisor has left, so that its agents can join again, else new
    keys. ``port``: the port to listen at; 0: the port of the killed supervisor, else any.
    """
    # Lock the supervisor's file, because the join file appears only once it is complete.
    own_path = _supervisor_path(path)
    with os.fdopen(_open_private(own_path), "r+b") as held:
        try:
            take_lock(held.fileno())
        except OSError:
            raise ConfigError(
                f"another supervisor is using {path}",
                field="join_file",
                value=str(path),
                fix="stop that launch, or name another file with --join-file",
            ) from None
        # Remove the join file of a killed supervisor: nobody listens at its endpoint.
        path.unlink(missing_ok=True)
        left = held.read(_MOST_BYTES)
        try:
            keys = msgspec.json.decode(left, type=JoinKeys) if left else new_join_keys(port)
            # A given port replaces the old one, which may be in use or blocked.
            keys = msgspec.structs.replace(keys, port=port or keys.port)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{own_path} does not hold the keys of a supervisor: {error}",
                field="join_file",
                value=str(path),
                fix="remove it, or name another file with --join-file",
            ) from None
        try:
            yield keys
        finally:
            path.unlink(missing_ok=True)
            own_path.unlink(missing_ok=True)


def write_join_files(path: Path, keys: JoinKeys, endpoint: str) -> None:
    """Write the join file for agents, and the file for a supervisor's successor; mode 0600."""
    port = int(endpoint.rpartition(":")[2])
    # Write in place, to keep the lock on this file.
    _write_private(_supervisor_path(path), msgspec.structs.replace(keys, port=port))
    part = path.with_name(f"{path.name}.part")
    _write_private(part, keys.ticket(endpoint))
    part.replace(path)


def read_ticket(name: str) -> JoinTicket:
    """Read a join file, or its line from standard input (``-``). Raises ConfigError."""
    is_stdin = name == "-"
    try:
        text = sys.stdin.buffer.readline(_MOST_BYTES) if is_stdin else _read_private(Path(name))
        return msgspec.json.decode(text, type=JoinTicket)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{'standard input' if is_stdin else name} is not a join file: {reason}",
            field="--join",
            value=name,
            fix="copy the join file that `pdlaunch serve --placement hosts` names, as it is",
        ) from None


def _supervisor_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.supervisor")


def _open_private(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        # The owner of another user's file could read the keys.
        if os.fstat(descriptor).st_uid != os.geteuid():
            os.close(descriptor)
            raise PermissionError(errno.EPERM, "it belongs to another user")
        os.fchmod(descriptor, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}",
            field="join_file",
            value=str(path),
            fix="name a file that you may write to with --join-file",
        ) from None
    return descriptor


def _write_private(path: Path, content: JoinTicket | JoinKeys) -> None:
    with os.fdopen(_open_private(path), "r+b") as file:
        file.truncate()
        file.write(msgspec.json.encode(content) + b"\n")


def _read_private(path: Path) -> bytes:
    """Read a secret file. Raises ConfigError if other users can read it, and OSError."""
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        if mode & 0o077:
            raise ConfigError(
                f"other users can read {path}, which holds a secret: its mode is {mode:o}",
                field="--join",
                value=str(path),
                fix=f"chmod 600 {path}, and restart the launch if another user may have read it",
            )
        return file.read(_MOST_BYTES)


def joined_host(join: Join) -> ResolvedHost:
    """Return the host that an agent described in its Join."""
    return ResolvedHost(
        join.name,
        join.machine,
        join.environ,
        join.address,
        join.address,
        executables=join.executables,
    )
