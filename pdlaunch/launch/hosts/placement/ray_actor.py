"""Runs an agent where Ray has found room for an engine. Ray loads this module in its workers."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence

import msgspec
import zmq

from pdlaunch.launch.hosts.join import JoinTicket

_STOP_TIMEOUT_S = 20.0


class AgentActor:
    """Holds the resources of an engine, and runs the agent that starts it.

    It draws the agent's key pair itself: what passes through Ray (public keys, an address) opens
    nothing to who reads it.
    """

    def __init__(self, name: str, num_cpus: int, executables: Sequence[str]) -> None:
        """``executables``: the programs of engines that the agent allows."""
        public, secret = zmq.curve_keypair()
        self._public, self._secret = public.decode(), secret.decode()
        self._name = name
        self._num_cpus = num_cpus
        self._allowed = [word for each in executables for word in ("--allow-executable", each)]
        self._agent: subprocess.Popen[bytes] | None = None

    def state(self) -> tuple[str, bool]:
        """Return the public key that its agent joins with, and whether the agent runs.

        The key changes when Ray restarts the actor.
        """
        return self._public, self._agent is not None and self._agent.poll() is None

    def start(self, endpoint: str, server_public: str) -> None:
        """Start the agent; its standard input, which this actor holds, ends with it."""
        self.stop()
        command = [sys.executable, "-P", "-m", "pdlaunch", "agent", "--join", "-"]
        command += ["--name", self._name, "--cpus", str(self._num_cpus), "--stop-on-stdin-eof"]
        command += self._allowed
        self._agent = subprocess.Popen(command, stdin=subprocess.PIPE)
        ticket = JoinTicket(
            endpoint=endpoint,
            server_public=server_public,
            public=self._public,
            secret=self._secret,
        )
        assert self._agent.stdin is not None
        self._agent.stdin.write(msgspec.json.encode(ticket) + b"\n")
        self._agent.stdin.flush()

    def stop(self) -> None:
        """End the agent, and with it all that it has started."""
        if self._agent is None:
            return
        assert self._agent.stdin is not None
        with contextlib.suppress(OSError):
            self._agent.stdin.close()
        try:
            self._agent.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._agent.kill()
            self._agent.wait()
        self._agent = None
