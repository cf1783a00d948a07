"""Runs ``pdlaunch serve`` as a child process, for benchmarks, ``pdlaunch.Launch`` and tests. It
ends with the block that started it, or when this process dies, because its standard input closes.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdlaunch.config.http_names import local_url
from pdlaunch.errors import PdlaunchError, StartupError
from pdlaunch.launch.client.api import Api

PREFIX = "pdlaunch-deployment-"
OUTPUT = "output.log"
_POLL_S = 0.1
_HEALTH_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 60.0


@dataclass
class Deployment:
    """Controls a running ``pdlaunch serve``; ``running_deployment`` yields it."""

    process: subprocess.Popen[bytes]
    url: str
    log_dir: Path
    output_file: Path
    start_s: float = 0.0  # time between the command and the first ``/health`` 200

    def output(self) -> str:
        return self.output_file.read_text(errors="replace")

    def stop(self, timeout_s: float = _STOP_TIMEOUT_S) -> int:
        """Send SIGTERM and wait; return the exit code.

        Ctrl-C during the wait is forwarded, so that the deployment skips its drain; the
        KeyboardInterrupt is raised once it has ended. Raises PdlaunchError if it had to be killed.
        """
        interrupt: KeyboardInterrupt | None = None
        with self.process:
            while self.process.poll() is None:
                try:
                    self.process.send_signal(signal.SIGTERM if interrupt is None else signal.SIGINT)
                    self.process.wait(timeout_s)
                except KeyboardInterrupt as again:
                    interrupt = again
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    raise PdlaunchError(
                        f"pdlaunch serve did not stop within {timeout_s:g} s and was killed"
                    ) from interrupt
        if interrupt is not None:
            raise interrupt
        return self.process.returncode


@contextlib.contextmanager
def running_deployment(
    arguments: Sequence[str] = (),
    *,
    environ: Mapping[str, str] | None = None,
    log_dir: str | None = None,  # by default, in a temporary folder
    host: str = "127.0.0.1",
    port: int | None = None,
    timeout_s: float = 300.0,
    is_tls: bool = False,  # ``arguments`` have a certificate for ``host``
) -> Iterator[Deployment]:
    """Start ``pdlaunch serve``, wait until it is healthy, stop it later. Raises StartupError."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX)))
        sink = stack.enter_context((folder / OUTPUT).open("wb"))
        logs = log_dir or f"{folder}/logs"
        port = port or stack.enter_context(held_port())
        own = ["--host", host, "--port", str(port), "--log-dir", logs, "--stop-on-stdin-eof"]
        # -P: do not import a folder named pdlaunch in the current folder.
        command = [sys.executable, "-P", "-m", "pdlaunch", "serve", *arguments, *own]
        start_at = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=dict(os.environ if environ is None else environ),
            # Only this process gets Ctrl-C; it stops the deployment.
            start_new_session=True,
        )
        url = local_url(host, port, is_tls=is_tls)
        deployment = Deployment(process, url, Path(logs), folder / OUTPUT)
        try:
            _await_health(deployment, start_at + timeout_s)
            deployment.start_s = time.monotonic() - start_at
            yield deployment
        finally:
            deployment.stop()


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """Yield a TCP port of 127.0.0.1 that the kernel gives to nobody else until the block ends.

    A server that gets the number can listen there if it sets SO_REUSEADDR, as this socket does.
    This socket also sets SO_REUSEPORT, so that a launch can hold the port, too.
    """
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        # After bind: with these options, bind might choose the port of another holder.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield int(holder.getsockname()[1])


def _await_health(deployment: Deployment, deadline_at: float) -> None:
    api = Api(deployment.url, timeout_s=_HEALTH_TIMEOUT_S)
    while time.monotonic() < deadline_at:
        code = deployment.process.poll()
        if code is not None:
            raise StartupError(f"pdlaunch serve ended with code {code}:\n{deployment.output()}")
        with contextlib.suppress(PdlaunchError):
            if api.get("/health")[0] == 200:
                return
        time.sleep(_POLL_S)
    raise StartupError(f"pdlaunch serve was not healthy in time:\n{deployment.output()}")
