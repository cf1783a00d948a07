"""Checks the bytes of an HTTP body against a request model; every error names the field."""

import re
from typing import Any, ClassVar, TypeVar

import msgspec
import pydantic

from pdlaunch.errors import RequestError

# Fields that vLLM supports and native engines do not.
OF_VLLM = frozenset(
    {
        *("allowed_token_ids", "bad_words", "chat_template", "documents", "length_penalty"),
        *("logits_processors", "logprob_token_ids", "prompt_embeds", "repetition_detection"),
        *("return_tokens_as_token_ids", "spaces_between_special_tokens", "thinking_token_budget"),
        *("truncate_prompt_tokens", "use_beam_search"),
    }
)
_BY_VLLM = " by native engines (engines of vLLM have it: --engine vllm)"
# Most strings, lists and objects of a body; Python objects are far larger than their JSON text
MAX_JSON_VALUES = 100_000
MAX_IGNORED_NAMES = 64
# Fields that engines accept and that the router refuses from clients
INTERNAL_FIELDS = frozenset({"kv_transfer_params", "prompt_token_ids", "resume"})
TOKEN_IDS = re.compile(rb"\s*\[\s*\d")  # the beginning of a list of token ids
# Possessive, and matches an unfinished string too, so that no text makes the regex backtrack.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+"?', re.DOTALL)

R = TypeVar("R", bound="RequestBody")
Values = dict[str, tuple[object, ...]]


class RequestBody(pydantic.BaseModel):
    """Checks known fields strictly and ignores unknown ones; ``null`` means the default."""

    model_config = pydantic.ConfigDict(
        extra="ignore", strict=True, frozen=True, allow_inf_nan=False
    )

    # Unsupported fields of the API, each with the values that are accepted, besides ``null``,
    # because they change nothing.
    NEUTRAL: ClassVar[Values] = {}
    HINTS: ClassVar[frozenset[str]] = frozenset()  # fields that are ignored, whatever their value
    PLACE: ClassVar[str] = ""  # path of this object in a body, without indices: ``messages.``

    _ignored: tuple[str, ...] = pydantic.PrivateAttr(())

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """Return the paths of the body's unknown fields, including those of nested objects."""
        return self._ignored

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take_known(cls, body: object, info: pydantic.ValidationInfo) -> object:
        """Drop nulls, hints and unknown fields. Raises RequestError for unsupported fields."""
        if not isinstance(body, dict):
            return body
        known: dict[str, object] = {}
        for name, value in body.items():
            if value is None or name in cls.HINTS:
                continue
            if name in cls.model_fields:
                known[name] = value
            elif name not in cls.NEUTRAL:
                if isinstance(info.context, dict) and len(info.context) < MAX_IGNORED_NAMES:
                    info.context[cls.PLACE + name] = None
            # The type is compared too, because True == 1 in Python.
            elif (type(value), value) not in [(type(each), each) for each in cls.NEUTRAL[name]]:
                raise RequestError(
                    f"{name} is not supported{_BY_VLLM if name in OF_VLLM else ''}; leave it out",
                    param=name,
                    code="unsupported_parameter",
                )
        return known


def parse_request(kind: type[R], body: dict[str, Any], *, public: bool) -> R:
    """Check ``body``, of a client if ``public``. Raises RequestError that names the field."""
    if public:
        refuse_internal_fields(body)
    ignored: dict[str, None] = {}
    try:
        request = kind.model_validate(body, context=ignored)
    except pydantic.ValidationError as error:
        raise _request_error(error) from None
    request._ignored = tuple(ignored)
    return request


def refuse_internal_fields(body: dict[str, Any]) -> None:
    """Raise RequestError for a client's body with fields that only routers may send."""
    # vLLM copies vllm_xargs into its own fields without a check: a string as kv_transfer_params
    # kills its engine core.
    xargs = body.get("vllm_xargs")
    places = {"": body, "vllm_xargs.": xargs if isinstance(xargs, dict) else {}}
    for place, fields in places.items():
        for name in sorted(INTERNAL_FIELDS & fields.keys()):
            if fields[name] is not None:
                raise RequestError(
                    f"{place}{name} is set by pdlaunch itself; leave it out",
                    param=place + name,
                    code="unsupported_parameter",
                )


def read_json_object(raw: bytes, *, public: bool = True) -> dict[str, Any]:
    """Return the JSON object in ``raw``. Raises RequestError."""
    check_num_values(raw, public=public)
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    return body


def check_num_values(raw: bytes, *, public: bool = True) -> None:
    """Refuse a body with too many values before it is parsed. Raises RequestError."""
    if raw.count(b'"') // 2 + raw.count(b"[") + raw.count(b"{") <= MAX_JSON_VALUES:
        return
    # The ``resume`` of a router grows with the answer, so it is not counted.
    resume = b"" if public else _member(raw, "resume")
    if num_values(raw.replace(resume, b"", 1)) > MAX_JSON_VALUES:
        message = f"the body has more than {MAX_JSON_VALUES} strings, lists and objects"
        raise RequestError(message, code="too_many_values")


def num_values(raw: bytes) -> int:
    """Count strings (up to ``MAX_JSON_VALUES + 1``), lists and objects of a JSON text."""
    outside, num_strings = _STRING.subn(b"", raw, MAX_JSON_VALUES + 1)
    return num_strings + outside.count(b"[") + outside.count(b"{")


def num_token_ids(raw: bytes, member: str, *, public: bool = True) -> int:
    """Return the length of a list of token ids, unparsed; 0: it is none. Raises RequestError."""
    check_num_values(raw, public=public)
    value = _member(raw, member)
    return value.count(b",") + 1 if TOKEN_IDS.match(value) else 0


def _member(raw: bytes, name: str) -> bytes:
    try:
        return bytes(msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get(name, b""))
    except (ValueError, RecursionError):
        return b""


def _request_error(error: pydantic.ValidationError) -> RequestError:
    """Return pydantic's first error, with the path in OpenAI's form: ``messages[0].role``."""
    first = error.errors(include_url=False)[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    place = f"{path}: " if path else ""
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        # A copy: pydantic's error references the original where the garbage collector cannot see
        # it. Raising the original would make a cycle that keeps the request's body forever.
        param = ".".join(filter(None, (path, cause.param))) or None
        return RequestError(f"{place}{cause}", param=param, status=cause.status, code=cause.code)
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], int | float):
        message = f"{message}, got {first['input']}"
    return RequestError(f"{place}{message}", param=path or None, code="invalid_value")
