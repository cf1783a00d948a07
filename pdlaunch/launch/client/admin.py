"""Finds where to send commands: to the admin socket of a launch of this user, or to a router whose
admin key is known.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from urllib.parse import urlsplit

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import Api, check_url
from pdlaunch.protocol.process.run_dirs import RunningLaunch, running_launches

CALL_TIMEOUT_S = 900.0
"""Timeout of a command; longer than engines wait for what runs before they sleep."""


def admin_api(
    url: str | None = None, admin_api_key: str | None = None, *, base: Path | None = None
) -> Api:
    """Return the API of the launch that answers at ``url``, or of the only one that runs.

    ``admin_api_key`` is only used where no launch of this user listens at ``url``. ``base``: the
    folder in which launches are looked for. Raises PdlaunchError when no launch, or more than one,
    fits.
    """
    if url is not None:
        check_url(url)
    running, found = running_launches(base), own_launches(url, base)
    if len(found) == 1:
        return Api("http://launch", timeout_s=CALL_TIMEOUT_S, socket_path=found[0].admin_socket)
    if url is not None and admin_api_key is not None:
        return Api(url, admin_api_key, CALL_TIMEOUT_S)
    raise PdlaunchError(_why_not(url, found, running))


def own_launches(url: str | None, base: Path | None = None) -> list[RunningLaunch]:
    """Return the launches of this user that listen at ``url``; all of them without one."""
    return [
        launch
        for launch in running_launches(base)
        if url is None or _is_same_address(launch.card.url, url)
    ]


def _why_not(url: str | None, found: list[RunningLaunch], running: list[RunningLaunch]) -> str:
    urls = ", ".join(sorted(launch.card.url for launch in running))
    if len(found) > 1:
        return f"several launches of yours run here; choose one with --url: {urls}"
    if url is None:
        return (
            "no launch of yours runs here; name another's router with --url and its key with "
            "--admin-api-key"
        )
    others = f"; these do: {urls}" if running else ""
    return (
        f"no launch of yours listens at {url}, and to command another's its --admin-api-key is "
        f"needed{others}"
    )


def _is_same_address(known: str, given: str) -> bool:
    """Compare the addresses of two URLs.

    Loopback has many names; other ones must be equal: a launch here is not the one at the same port
    elsewhere.
    """
    ours, theirs = urlsplit(known), urlsplit(given)
    return ours.port == (theirs.port or 80) and _plain_host(ours.hostname) == _plain_host(
        theirs.hostname
    )


def _plain_host(host: str | None) -> str:
    try:
        return "localhost" if ipaddress.ip_address(host or "").is_loopback else str(host)
    except ValueError:
        return host or ""
