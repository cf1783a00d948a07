"""A few synchronous calls to a router or an engine, for commands and tests."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from pdlaunch.errors import PdlaunchError


class Api:
    """One HTTP server of a deployment. Raises PdlaunchError when it cannot be reached in ``timeout_s``."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and JSON body, also of an error."""
        status, content = self._call(path, json.dumps(body).encode())
        return status, json.loads(content)

    def post_text(self, path: str, body: dict[str, Any]) -> str:
        """The whole body as text, for streams of events."""
        return self._call(path, json.dumps(body).encode())[1].decode()

    def get(self, path: str) -> tuple[int, str]:
        """Status and text."""
        status, content = self._call(path, None)
        return status, content.decode()

    def metrics(self) -> dict[str, float]:
        """Samples of ``/metrics``, summed over their labels."""
        totals: dict[str, float] = {}
        for line in self.get("/metrics")[1].splitlines():
            if line and not line.startswith("#"):
                sample, _, value = line.rpartition(" ")
                name = sample.split("{")[0]
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def _call(self, path: str, body: bytes | None) -> tuple[int, bytes]:
        headers = self._headers | ({"Content-Type": "application/json"} if body is not None else {})
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except OSError as error:
            raise PdlaunchError(f"{self.url}{path} cannot be reached: {_reason(error)}") from error


def check_url(url: str) -> None:
    """Raises PdlaunchError unless ``url`` is ``http://host:port`` or the like."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and parts.path in ("", "/")
    except ValueError:
        is_usable = False
    if not is_usable:
        raise PdlaunchError(f"{url} is no URL of a deployment; write http://host:port")


def _reason(error: OSError) -> str:
    """In words, without the layers that it came through."""
    cause = getattr(error, "reason", error)
    return getattr(cause, "strerror", None) or str(cause)
