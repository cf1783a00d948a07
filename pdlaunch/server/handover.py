"""What a prefill engine answers so that a decode engine can go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pdlaunch.protocol.engine import SetReaders
from pdlaunch.protocol.kv_params import FirstToken, PdlaunchParams, RemoteKV, to_wire
from pdlaunch.server.choice import Choice, Delta
from pdlaunch.server.rank_link import RankLink


def hand_over(
    link: RankLink, choices: Sequence[Choice], deltas: Sequence[Delta], remote: RemoteKV | None
) -> dict[str, Any] | None:
    """``kv_transfer_params`` of the answer; None when every choice ended with its first token, and
    then the lease ends too.

    Without leased blocks the decode engine gets the first tokens alone and computes the prompt
    itself.
    """
    lease_id = choices[0].request.request_id
    num_open = sum(choice.finish_reason != "stop" for choice in choices)
    if num_open == 0:
        link.abort(lease_id)
        return None
    if num_open < len(choices) and remote is not None:
        link.send(SetReaders(request_id=lease_id, num_readers=num_open))
    first_tokens = PdlaunchParams(first_tokens=[_first_token(delta) for delta in deltas])
    if remote is None:
        return {
            "do_remote_prefill": False,
            "do_remote_decode": False,
            "pdlaunch": msgspec.to_builtins(first_tokens),
        }
    return to_wire(remote, first_tokens)


def _first_token(delta: Delta) -> FirstToken:
    (token,) = delta.tokens
    return FirstToken(
        token_id=token.token_id,
        finish_reason="stop" if delta.finish_reason == "stop" else None,
        logprob=token.logprob,
        top_logprobs=list(token.top_logprobs),
    )
