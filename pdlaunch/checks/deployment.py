"""Holds what can be seen of engines that run already, over HTTP; rules PD65x judge it."""

from __future__ import annotations

from dataclasses import dataclass

from pdlaunch.config.roles import Role


@dataclass(frozen=True, slots=True)
class SeenEngine:
    """Says what one engine answers; None where it does not say."""

    role: Role
    url: str
    kind: str = "vllm"
    problem: str = ""
    """The reason why it cannot be asked; nothing else is known then."""
    version: str | None = None
    models: tuple[str, ...] = ()
    max_model_len: int | None = None
    block_size: str | None = None
    cache_dtype: str | None = None
    prompt_tokens: int = 0
    """Prompt tokens that it has taken since its start."""
    bytes_read: int = 0
    """KV bytes that it has read from prefill engines."""
    gigabytes_per_s: float | None = None
    """Mean speed of these READs; None: too few bytes to tell."""
    expected_gigabytes_per_s: float | None = None
    """The speed that the slowest of its links to prefill engines should give; None: not known."""
    link: str = ""
    """That link in words, or the reason why its speed is not known; empty: there is no link."""
    num_expired: int = 0
    """Leases that ended before their blocks were read."""
    num_failed: int = 0
    """Transfers and notifications that failed."""
    num_answers: int = 0
    """Answers since its start, which vLLM alone tells, and the tokens of all."""
    answer_tokens: int = 0
    has_dev_mode: bool = False
    kv_role: str | None = None
    lease_s: int | None = None
    on_failure: str | None = None
    """The last three are told in dev mode alone."""

    @property
    def name(self) -> str:
        return f"{self.role} {self.url}"


@dataclass(frozen=True, slots=True)
class SeenPair:
    """Says what became of a canary through a pair of engines."""

    prefill: str
    decode: str
    """URLs."""
    problem: str = ""
    """The reason why the canary died; empty: it came through."""
    num_bytes: int = 0
    is_told: bool = True
    """Decode has told that it did not compute the canary; else these bytes are all that is known,
    and other requests may have read them."""
    seconds: float = 0.0
    side_channel: str = ""
    """``HOST:PORT`` at which decode is told to shake hands; empty: of an engine without one."""
    wrong_address: str = ""
    """The reason why decode cannot find it there; empty: none is known."""
    handshake: str | None = None
    """The metadata that a handshake returned; None: nobody asked."""
    silence: str = ""
    """The reason why the side channel did not answer; empty: it did, or nobody asked."""


@dataclass(frozen=True, slots=True)
class SeenDeployment:
    """Holds the engines and pairs of a deployment that runs already."""

    engines: tuple[SeenEngine, ...]
    pairs: tuple[SeenPair, ...] | None
    """None: no canary was sent."""
    has_asked_side_channels: bool = False

    def of(self, role: Role) -> tuple[SeenEngine, ...]:
        """Return the engines of a role that answer."""
        return tuple(each for each in self.engines if each.role == role and not each.problem)
