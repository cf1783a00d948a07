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
│   └── VerificationError   nobody: token hash or checksum differ; the blocks are not used
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
    pass


class StartupError(PdlaunchError):
    """A process or a pair of engines did not come up."""


class RequestError(PdlaunchError, ValueError):
    """Becomes the body of an error in OpenAI's format."""

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


class OverloadedError(RequestError):
    def __init__(
        self, message: str, *, status: int = 429, retry_after_s: int = 1, code: str | None = None
    ) -> None:
        super().__init__(message, status=status, code=code)
        self.retry_after_s = retry_after_s


class KillsEngineError(RequestError):
    def __init__(self, message: str) -> None:
        super().__init__(message, status=500, code="request_kills_engine")


class TransferError(PdlaunchError):
    pass


class HandshakeError(TransferError):
    pass


class LeaseError(TransferError):
    pass


class VerificationError(TransferError):
    pass


class MemoryPoolError(PdlaunchError):
    pass


class ProtocolError(PdlaunchError):
    pass
