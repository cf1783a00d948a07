"""Defines the exception tree of pdlaunch; each class says who has to act.

PdlaunchError
├── ConfigError             the user: a setting is wrong; names field, value and fix
│   ├── InvalidConfigError      the user: several settings are wrong (``config.problems``)
│   └── UnsupportedModelError   the user: pdlaunch cannot serve this model; names the reason
├── StartupError            the user: a process or a pair did not come up; names the root cause
├── RequestError            the caller of the API: HTTP 400 (or ``status``), names the parameter
│   ├── KillsEngineError    us: engines crash of this request, it is not tried again (HTTP 500)
│   └── OverloadedError     the caller: try again after ``retry_after_s`` (HTTP 429 or 503)
├── TransferError           nobody: a KV block was not moved or proven; pulled again or recomputed
│   ├── HandshakeError      the user: two engines do not fit; names the field and both values
│   ├── LeaseError          nobody: the lease on the blocks has ended
│   ├── VerificationError   nobody: token hash or checksum differ; the blocks are not used
│   └── TransferSpecError   us: blocks to copy between device and host are described wrongly
├── MemoryPoolError         the user: a memory pool has no room, sleeps, or is owned already
└── ProtocolError           us, or a stranger on the socket: a message has not the agreed form
"""

from __future__ import annotations


class PdlaunchError(Exception):
    """Is the base of every error that pdlaunch raises on purpose."""


class ConfigError(PdlaunchError, ValueError):
    """A setting is wrong.

    ``field`` is the dotted path in the config file, ``value`` what was found there (never a
    secret), ``fix`` what to do.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        value: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(message)
        self.field = field
        self.value = value
        self.fix = fix


class UnsupportedModelError(ConfigError):
    """pdlaunch cannot serve this model; raised before any weight is read."""


class StartupError(PdlaunchError):
    """A process or a pair of engines did not come up."""


class RequestError(PdlaunchError, ValueError):
    """A request to the API cannot be served as it was sent; becomes an error body in OpenAI's
    format.
    """

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


class OverloadedError(RequestError):
    """The engine or the router has no room for the request now."""

    def __init__(
        self, message: str, *, status: int = 429, retry_after_s: int = 1, code: str | None = None
    ) -> None:
        super().__init__(message, status=status, code=code)
        self.retry_after_s = retry_after_s


class KillsEngineError(RequestError):
    """Is raised when ranks died of the request."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=500, code="request_kills_engine")


class TransferError(PdlaunchError):
    """Is raised when KV blocks could not be moved, or not be proven right."""


class HandshakeError(TransferError):
    """Two engines cannot exchange KV blocks."""


class LeaseError(TransferError):
    """The lease on the remote blocks has ended or never was."""


class VerificationError(TransferError):
    """Token hash or checksum of a pulled block differ from what the prefill engine stated."""


class TransferSpecError(TransferError, ValueError):
    """A transfer between device and host names groups, blocks and chunks that do not fit each
    other; nothing is copied.
    """


class MemoryPoolError(PdlaunchError):
    """A pool of device memory cannot do what was asked of it now."""


class ProtocolError(PdlaunchError):
    """A message from another process does not have the agreed form."""
