"""Runs an HTTP process under its supervisor, from the bootstrap to the exit code.

::

    bootstrap ──> Register ──> Ready ──> Registry, Drain, .. ──> Stop ──> 0
         └──────────┴────────────┴──────────────┴──> Failed ──> 1
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from pdlaunch.errors import PdlaunchError
from pdlaunch.observe.logs import setup_logging
from pdlaunch.protocol import control
from pdlaunch.protocol.ids import EngineId
from pdlaunch.protocol.process.bootstrap import Bootstrap, ControlClient, Heartbeat, read_bootstrap
from pdlaunch.protocol.sockets import SecureContext

SHUTDOWN_TIMEOUT_S = 1.0  # seconds that handlers may still run after Stop; draining came before

_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_logger = logging.getLogger(__name__)


class Supervised:
    """This process as its supervisor sees it; made and used inside a running event loop."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        loop = asyncio.get_running_loop()
        self.bootstrap = bootstrap
        self.context = SecureContext(bootstrap.keys)
        # An error is the reason why this process cannot go on.
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
            # As of a rank: see leave_ends_to_supervisor.
            for number in _END_SIGNALS:
                asyncio.get_running_loop().add_signal_handler(number, lambda: None)
        self._control.send(message)

    async def obey(
        self,
        learn: Callable[[control.Registry], Awaitable[None]],
        drain: Callable[[float], Coroutine[Any, Any, None]],
    ) -> None:
        """Do what the supervisor says until Stop. Raises the error that ends this process."""
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
                    pass  # said to routers alone

    def register(
        self,
        address: control.Address,
        capabilities: control.Capabilities | None = None,
        *,
        engine_id: EngineId = EngineId(""),  # noqa: B008 - a string
        listens: bool = True,
    ) -> None:
        """Tell where this process listens, and show from now on that its loop turns.

        ``engine_id``: of a vLLM engine. A second call replaces the first.
        """
        self.send(
            control.Register(
                name=self.bootstrap.name,
                incarnation=self.bootstrap.incarnation,
                pid=os.getpid(),
                engine_id=engine_id,
                address=address,
                capabilities=capabilities or self.bootstrap.capabilities,
                listens=listens,
            )
        )
        if not self._is_registered:
            # Only now: the supervisor takes Register for the first message of a process.
            self.spawn(Heartbeat(self.send, self.bootstrap.heartbeat_s).run())
        self._is_registered = True

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run ``work`` until it ends or this process leaves."""
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
    """Read the bootstrap from standard input and serve; return the exit code, 1 after a failure.

    ``serve`` returns after Stop; the supervisor is told what it raises.
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
