"""Renders a launch as a file of docker compose: a container for each engine, one for the router."""

from __future__ import annotations

from typing import Any

from pdlaunch.launch.render.pods import (
    CONFIG_FILE,
    HEALTH,
    JOIN_KEY,
    PROBE_S,
    SUPERVISOR_FILE,
    SUPERVISOR_KEY,
    PodLaunch,
    agent_command,
    with_own_secret,
)
from pdlaunch.launch.render.settings import JOIN_FILE, EngineGroup, grace_s

Service = dict[str, Any]


def compose_endpoint(launch: PodLaunch) -> str:
    """Return where agents find the supervisor."""
    return f"tcp://router:{launch.resolved.config.control_port}"


def compose_file(launch: PodLaunch) -> dict[str, Any]:
    """Return the file. Its secrets are files and variables beside it, which it does not hold."""
    services = {"router": _router(launch)}
    for group in launch.groups:
        for name in group.machines.names:
            services[name] = _engine(launch, group, name)
    return {
        "name": launch.options.name,
        "services": services,
        "networks": {"launch": {}},
        "volumes": {"cache": {}},
        "configs": {"deployment": {"content": _escaped(launch.config_yaml)}},
        "secrets": {key: {"file": f"./{key}"} for key in (JOIN_KEY, SUPERVISOR_KEY)},
    }


def _router(launch: PodLaunch) -> Service:
    config = launch.resolved.config
    url = f"http://127.0.0.1:{config.port}{HEALTH}"
    # Docker may give every container the proxy of its client.
    opener = "r.build_opener(r.ProxyHandler({}))"
    probe = f"import urllib.request as r; {opener}.open({url!r}, timeout={PROBE_S})"
    command = ["pdlaunch", "serve", CONFIG_FILE, "--resume"]
    return _service(launch, command, SUPERVISOR_KEY, SUPERVISOR_FILE) | {
        "hostname": "router",
        "environment": {
            **_variables(),
            # The router's own name is the one that agents find in the network.
            "PDLAUNCH_ALLOWED_HOSTS": ",".join([*config.allowed_hosts, "router"]),
            **{name: f"${{{name}:?}}" for name in launch.placed.keys},
        },
        "ports": [f"127.0.0.1:{config.port}:{config.port}"],
        "configs": [{"source": "deployment", "target": CONFIG_FILE}],
        "healthcheck": {
            "test": ["CMD", "python", "-c", probe],
            "interval": f"{PROBE_S}s",
            "timeout": f"{2 * PROBE_S}s",
            "start_period": f"{config.join_timeout_s + config.startup_timeout_s:.0f}s",
        },
    }


def _engine(launch: PodLaunch, group: EngineGroup, name: str) -> Service:
    command = agent_command(launch, group, name)
    secrets = launch.placed.engine_secrets.get(group.role, {})
    service = _service(launch, command, JOIN_KEY, JOIN_FILE) | {
        "hostname": name,
        "environment": {**_variables(), **{each: f"${{{each}:?}}" for each in secrets}},
        "shm_size": "1gb",
    }
    if group.num_gpus:
        devices = [{"driver": "nvidia", "count": group.num_gpus, "capabilities": ["gpu"]}]
        service["deploy"] = {"resources": {"reservations": {"devices": devices}}}
    return service


def _service(launch: PodLaunch, command: list[str], key: str, file: str) -> Service:
    claims = (launch.options.claims or {}).items()
    return {
        "image": launch.options.image,
        # Compose reads a dollar as the beginning of a variable.
        "entrypoint": with_own_secret(key, file, [], "$$@"),
        "command": command,
        "restart": "unless-stopped",
        "stop_grace_period": f"{grace_s(launch.resolved)}s",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "read_only": True,
        "tmpfs": ["/tmp", f"{JOIN_FILE.rpartition('/')[0]}:mode=1777"],
        "volumes": ["cache:/cache", *(f"{source}:{folder}:ro" for folder, source in claims)],
        "secrets": [key],
        "networks": ["launch"],
    }


def _variables() -> dict[str, str]:
    return {
        "HOME": "/tmp",
        "PDLAUNCH_CACHE": "/cache/pdlaunch",
        "HF_HOME": "/cache/huggingface",
    }


def _escaped(text: str) -> str:
    """Return text in which compose finds no variables."""
    return text.replace("$", "$$")
