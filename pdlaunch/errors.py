"""Defines the exceptions of pdlaunch; the text after each class says who has to act, and why.

PdlaunchError
├── ConfigError             the user: a setting is wrong; names field, value and fix
│   ├── InvalidConfigError      the user: several settings are wrong (``config.problems``)
│   └── UnsupportedModelError   the user: pdlaunch cannot serve this model; names the reason
├── StartupError            the user: a process or a pair did not come up; names the root cause
├── RequestError            the caller of the API: HTTP 400 (or ``status``), names the parameter
│   ├── KillsEngineError    us: engines crash on this request; it is not retried (HTTP 500)
│   └── OverloadedError     the caller: retry after ``retry_after_s`` (HTTP 429 or 503)
├── TransferError           no one: KV blocks were not moved or proven; decode retries or recomputes
│   ├── HandshakeError      the user: two engines do not fit; names the field and both values
│   ├── LeaseError          no one: the lease on the blocks has ended
│   └── VerificationError   no one: token hash or checksum differ; the blocks are not used
├── MemoryPoolError         the user: a memory pool is full, sleeps, or has another owner
└── ProtocolError           us, or a stranger on the socket: a message does not have its format
"""


class PdlaunchError(Exception):
    """Base class of all errors that pdlaunch raises on purpose."""


class ConfigError(PdlaunchError, ValueError):
    """A setting is wrong.

    ``field`` is the dotted path in the config file, ``value`` the value there (never a secret),
    ``fix`` an instruction.
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
    """The router or an engine answers with this error in OpenAI's format."""

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
