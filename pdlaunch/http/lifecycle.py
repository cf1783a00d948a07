"""Runs an HTTP process under its supervisor, from the bootstrap to the exit code.

::

    bootstrap ──> Register ──> Ready ──> Registry, Drain, .. ──> Stop ──> 0
         └──────────┴────────────┴──────────────┴──> Failed ──> 1
"""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from pdlaunch.errors import PdlaunchError
from pdlaunch.observe.logs import setup_logging
from pdlaunch.protocol import control
from pdlaunch.protocol.ids import EngineId
from pdlaunch.protocol.process.bootstrap import Bootstrap, ControlClient, Heartbeat, read_bootstrap
from pdlaunch.protocol.sockets import SecureContext

SHUTDOWN_TIMEOUT_S = 1.0  # how long handlers may run after Stop; a drain comes before Stop

_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_logger = logging.getLogger(__name__)


class Supervised:
    """Connects this process to its supervisor. Create and use it inside a running event loop."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        loop = asyncio.get_running_loop()
        self.bootstrap = bootstrap
        self.context = SecureContext(bootstrap.keys)
        # Messages of the supervisor; an error ends this process.
        self.inbox: asyncio.Queue[control.FromSupervisor | PdlaunchError] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_registered = False

        def deliver(message: control.FromSupervisor) -> None:
            # Called in the control channel's thread, which may outlive the loop.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.inbox.put_nowait, message)

        self._control = ControlClient(self.context, bootstrap.control, bootstrap.name, deliver)
        for number in _END_SIGNALS:
            loop.add_signal_handler(number, self.inbox.put_nowait, control.Stop())

    def send(self, message: control.ToSupervisor) -> None:
        if isinstance(message, control.Ready):
            # Ignore these signals from now on, as ranks do: see leave_ends_to_supervisor.
            for number in _END_SIGNALS:
                asyncio.get_running_loop().add_signal_handler(number, lambda: None)
        self._control.send(message)

    async def obey(
        self,
        learn: Callable[[control.Registry], Awaitable[None]],
        drain: Callable[[float], Coroutine[Any, Any, None]],
    ) -> None:
        """Handle messages until Stop. Raises the error that ends this process."""
        while True:
            match await self.inbox.get():
                case control.Registry() as registry:
                    await learn(registry)
                case control.Drain(timeout_s=timeout_s):
                    self.spawn(drain(timeout_s))
                case control.Stop():
                    return
                case PdlaunchError() as error:
                    raise error
                case control.Suspects() | control.Answered() | control.Happened():
                    pass  # The router reads its inbox itself.

    def register(
        self,
        address: control.Address,
        capabilities: control.Capabilities | None = None,
        *,
        engine_id: EngineId = EngineId(""),  # noqa: B008 - a string
        listens: bool = True,
    ) -> None:
        """Send the address of this process, and heartbeats from then on. A further call replaces
        the registration.
        """
        self.send(
            control.Register(
                name=self.bootstrap.name,
                incarnation=self.bootstrap.incarnation,
                engine_id=engine_id,
                address=address,
                capabilities=capabilities or self.bootstrap.capabilities,
                listens=listens,
            )
        )
        if not self._is_registered:
            # Start heartbeats after Register, which must be the first message of a process.
            self.spawn(Heartbeat(self.send, self.bootstrap.heartbeat_s).run())
        self._is_registered = True

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._control.close()
        self.context.close()


def run_supervised(serve: Callable[[Supervised], Awaitable[None]]) -> int:
    """Read the bootstrap from standard input and serve until Stop; return the exit code. If
    ``serve`` raises an error, the supervisor gets Failed with its text.
    """
    bootstrap = read_bootstrap()
    setup_logging(bootstrap.name, bootstrap.log_level, form=bootstrap.log_format)
    code = asyncio.run(_run(bootstrap, serve))
    logging.shutdown()
    return code


async def _run(bootstrap: Bootstrap, serve: Callable[[Supervised], Awaitable[None]]) -> int:
    supervised = Supervised(bootstrap)
    try:
        await serve(supervised)
        return 0
    except PdlaunchError as error:
        _logger.error("%s", error)
        supervised.send(control.Failed(error=str(error)))
    except Exception as error:
        _logger.exception("%s failed", bootstrap.name)
        supervised.send(control.Failed(error=f"{type(error).__name__}: {error}"))
    finally:
        supervised.close()
    return 1
