"""Whether the public port is free, asked before anything is started."""

from __future__ import annotations

import psutil

from pdlaunch.errors import StartupError
from pdlaunch.platform.ports import probe_port


def check_port(host: str, port: int) -> None:
    """Raises StartupError naming what is wrong with ``host:port``, and who holds a busy port where that can be seen."""
    state = probe_port(host, port)
    match state.problem if state is not None else None:
        case None:
            return
        case "busy":
            problem = f"port {port} of {host} is busy{_holder(port)}; free it, or choose another one with --port"
        case "privileged":
            problem = f"port {port} needs privileges; choose one from 1024 on with --port"
        case "not here" | "unknown host":
            problem = f"host {host} is no address of this machine; choose another one with --host"
        case "other":
            problem = f"cannot listen on {host}:{port}: {'' if state is None else state.detail}"
    raise StartupError(problem)


def _holder(port: int) -> str:
    """Empty when the system does not say: other users' processes are hidden."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return ""
    for connection in connections:
        listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
        if listens and connection.pid:
            try:
                return f" (held by {psutil.Process(connection.pid).name()}, pid {connection.pid})"
            except psutil.Error:
                return f" (held by pid {connection.pid})"
    return ""
