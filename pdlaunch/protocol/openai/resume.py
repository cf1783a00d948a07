"""The internal field ``resume``: a choice goes on at another engine.

``{"choices": [[{"token_id": 5, "logprob": -0.1, "top_logprobs": [[5, -0.1]]}, ...], ...], "sent":
true}``: the output tokens so far of each choice. A choice whose last token has a ``finish_reason``
is over and needs no more.
"""

from __future__ import annotations

import msgspec

from pdlaunch.errors import RequestError
from pdlaunch.protocol.kv_params import FirstToken


class Resume(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Output tokens that exist already, by choice."""

    choices: list[list[FirstToken]]
    sent: bool = True
    """The client has what a stream emits for these tokens (role, text, logprobs, finish_reason): it
    is not emitted again.
    """


def read_resume(field: object, num_choices: int) -> Resume:
    """Check the field; raises RequestError."""
    try:
        resume = msgspec.convert(field, Resume)
    except (msgspec.ValidationError, RecursionError) as error:
        raise RequestError(f"resume: {error}", param="resume") from None
    if len(resume.choices) != num_choices:
        raise RequestError(
            f"resume has {len(resume.choices)} choices, the request n={num_choices}",
            param="resume.choices",
        )
    return resume
