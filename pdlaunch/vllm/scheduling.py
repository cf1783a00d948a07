"""Decides in vLLM's EngineCore which blocks are lent to decode engines, and which are pulled.

::

    prefill   prompt computed ──> GrantLease, blocks stay ── LeaseEnded ──> blocks are free
    decode    matched: a prompt of a prefill engine, perhaps followed by prefill's token
              ──> blocks ──> StartPull ──> received, or failed
              nothing to pull (all is cached, aborted) ──> StartPull without blocks: ends the lease

A state, of a state space or of a convolution, stands for all tokens before it, and decode computes
the last prompt token itself. So prefill leaves that token out for models that keep states.

Commands go to all workers with the metadata of the next step. vLLM always takes one more step after
a request has ended. Grants also go at once, because that step may wait for a long step.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.kvcache.hashing import TokenHasher, root_hash
from pdlaunch.errors import RequestError
from pdlaunch.protocol import kv_params
from pdlaunch.protocol.engine_link import KVSetup
from pdlaunch.protocol.ids import LeaseId, PullId, RequestId
from pdlaunch.protocol.transfer import CancelPull, GrantLease, StartPull, TransferCommand

_logger = logging.getLogger(__name__)

NULL_BLOCK = 0  # stands in block tables for blocks that have left a sliding window
# Decode finds a prefill engine by its id in the registry; host and port are for other routers.
_NO_PORT = 1


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Describes a KV cache group; sizes in tokens."""

    block_size: int
    window: int | None  # blocks before it are freed; None: all blocks are kept
    in_chunks: bool = False  # the window starts again after each chunk
    is_state: bool = False  # only the last block counts: it stands for all tokens

    def loses_context(self, num_tokens: int) -> bool:
        """Return whether the last of ``num_tokens`` needs a block that both engines free early."""
        # After that token is computed, they keep only the blocks that the next token needs.
        if self.window is None or num_tokens < self.window:
            return False
        if self.in_chunks:
            return num_tokens % self.window == 0
        return (num_tokens - self.window + 1) % self.block_size == 0


@dataclass(eq=False)
class Scheduling:
    """Answers vLLM's scheduler; one for each engine. Call ``take_commands`` once a step."""

    setup: KVSetup
    settings: KVTransferSettings
    groups: Sequence[GroupShape]
    grant: Callable[[GrantLease], None]
    dp_rank: int
    tp_size: int

    def __post_init__(self) -> None:
        self._root = root_hash(self.setup.model_digest)
        self._hash_tokens = min(group.block_size for group in self.groups)
        self._keeps_states = any(group.is_state for group in self.groups)
        self._commands: list[TransferCommand] = []
        # Requests for which a lease was used: they are computed here from then on, if need be.
        self._asked: set[str] = set()
        self._shortened: set[str] = set()  # prompts without their last token
        self._loading: set[str] = set()  # requests whose blocks workers are pulling
        self._visits = count()

    def take_commands(self) -> list[TransferCommand]:
        commands, self._commands = self._commands, []
        return commands

    def added(self, request: Any) -> None:
        """Drop the last token of a prompt that will be lent with a state, as vLLM's own connectors
        do. The token that prefill then draws is not used: decode draws the first one.
        """
        if (
            self._keeps_states
            and request.num_prompt_tokens > 1
            and self._may_lend(request)
            # Decode computes such a prompt whole, for its log probabilities.
            and not request.skip_reading_prefix_cache
        ):
            del request.prompt_token_ids[-1:], request._all_token_ids[-1:]
            request.num_prompt_tokens -= 1
            request.max_tokens = 1
            self._shortened.add(request.request_id)

    def num_matched(self, request: Any, num_cached: int) -> int:
        """Return how many prompt tokens can be pulled after ``num_cached`` cached ones."""
        remote = self._remote(request)
        if request.request_id in self._asked or remote is None:
            return 0
        num_tokens = self._num_lent(request, remote)
        # vLLM computes the last prompt token again.
        if num_tokens == request.num_prompt_tokens and any(
            group.loses_context(num_tokens) for group in self.groups
        ):
            return 0
        return max(0, num_tokens - num_cached)

    def allocated(
        self, request: Any, tables: Sequence[Sequence[int]], num_external_tokens: int
    ) -> None:
        """Start to pull the last ``num_external_tokens`` of the prompt into blocks of these tables;
        if there is nothing to pull, end the lease.
        """
        remote = self._remote(request)
        if remote is None or request.request_id in self._asked:
            return
        self._asked.add(request.request_id)
        if num_external_tokens == 0:
            self._pull(request, remote, None, 0)
            return
        self._loading.add(request.request_id)
        self._pull(request, remote, tables, self._num_lent(request, remote) - num_external_tokens)

    def received(self, request_ids: Iterable[str]) -> None:
        """Record that workers no longer write to the blocks of these requests."""
        self._loading.difference_update(request_ids)

    def finished(
        self,
        request: Any,
        tables: Sequence[Sequence[int]],
        *,
        is_prefilled: bool,
        has_stopped: bool = False,
    ) -> dict[str, Any] | None:
        """Return the ``kv_transfer_params`` of a prompt whose blocks stay until their lease ends;
        None: they are free at once. ``is_prefilled``: the request has the one token that it asked
        for; ``has_stopped``: that token ended the answer.
        """
        request_id, remote = request.request_id, self._remote(request)
        if remote is not None:
            if request_id in self._loading:
                self._commands.append(CancelPull(pull_id=PullId(request_id)))
            elif request_id not in self._asked:
                self._pull(request, remote, None, 0)  # the lease still ends
            self._asked.discard(request_id)
            return None
        if self._keeps_states:
            # The token is not used, so it does not end the answer.
            lends = request_id in self._shortened and (is_prefilled or has_stopped)
            self._shortened.discard(request_id)
        else:
            lends = is_prefilled and self._may_lend(request)
        # Before vLLM 0.27, a request may end on a token that was in flight when the request was
        # preempted. Its blocks belong to other requests by then.
        return self._lend(request, tables) if lends and all(tables) else None

    def _may_lend(self, request: Any) -> bool:
        return bool(request.prompt_token_ids) and self._params(request).do_remote_decode

    def _num_lent(self, request: Any, remote: kv_params.RemoteKV) -> int:
        """Return how many tokens of a prompt a prefill engine has computed, for decode."""
        # The prompt may end with prefill's token, which has no lent block.
        return min(remote.num_tokens, int(request.num_prompt_tokens) - int(self._keeps_states))

    def _lend(self, request: Any, tables: Sequence[Sequence[int]]) -> dict[str, Any]:
        num_tokens, lease_s = request.num_prompt_tokens, self.settings.lease_s
        blocks, firsts = self._blocks_of(tables, 0, num_tokens)
        lease_id = LeaseId(request.request_id)
        grant = GrantLease(
            lease_id=lease_id,
            block_ids=blocks,
            first_block_index=firsts,
            block_hashes=self._hashes(request, num_tokens),
            num_tokens=num_tokens,
            num_readers=1,
            lease_s=lease_s,
        )
        self._commands.append(grant)
        self.grant(grant)
        remote = kv_params.RemoteKV(
            engine_id=self.setup.id_of(self.dp_rank),
            lease_id=lease_id,
            host=self.setup.advertise_address,
            port=_NO_PORT,
            block_ids=blocks,
            num_tokens=num_tokens,
            tp_size=self.tp_size,
            lease_s=lease_s,
        )
        if self._keeps_states:
            return kv_params.to_wire(remote, None)
        token = kv_params.TokenOutput(token_id=request.output_token_ids[0])
        return kv_params.to_wire(remote, kv_params.PdlaunchParams(first_tokens=[token]))

    def _pull(
        self,
        request: Any,
        remote: kv_params.RemoteKV,
        tables: Sequence[Sequence[int]] | None,
        num_cached: int,
    ) -> None:
        blocks: list[list[int]] = [[] for _ in self.groups]
        firsts = [0] * len(blocks)
        # Not the request's id: if vLLM refuses a request, that is the id that the client chose.
        pull_id = f"visit-{next(self._visits)}"
        num_tokens = self._num_lent(request, remote)
        if tables is not None:
            pull_id = request.request_id
            blocks, firsts = self._blocks_of(tables, num_cached, num_tokens)
        self._commands.append(
            StartPull(
                pull_id=PullId(pull_id),
                request_id=RequestId(request.request_id),
                remote=remote,
                block_ids=blocks,
                first_block_index=firsts,
                block_hashes=self._hashes(request, num_tokens),
                num_tokens=num_tokens,
            )
        )

    def _blocks_of(
        self, tables: Sequence[Sequence[int]], num_before: int, num_tokens: int
    ) -> tuple[list[list[int]], list[int]]:
        """Return the blocks of each group that hold tokens from ``num_before`` to ``num_tokens``,
        and the logical index of the first one.

        ::

            logical index     0 ........ first ............ last
            block table     | null | null | 17 | 4 | 23 | (room for tokens to come) |
        """
        blocks, firsts = [], []
        for group, table in zip(self.groups, tables, strict=True):
            last = -(-num_tokens // group.block_size)
            first = last - 1 if group.is_state else min(num_before // group.block_size, last)
            while first < last and table[first] == NULL_BLOCK:
                first += 1
            blocks.append(list(table[first:last]))
            firsts.append(first)
        return blocks, firsts

    def _hashes(self, request: Any, num_tokens: int) -> list[bytes]:
        """Return the chained hashes of a prompt's first tokens and its other inputs."""
        lora = "" if request.lora_request is None else request.lora_request.lora_name
        inputs = [f"{each.identifier}@{each.mm_position.offset}" for each in request.mm_features]
        # A longer prompt with the same first tokens has another state.
        more = [f"{num_tokens} tokens"] if self._keeps_states else []
        root = self._root
        if lora or inputs or more:
            salt = "\n".join((lora, *inputs, *more))
            root = root_hash(self.setup.model_digest, cache_salt=salt)
        tokens = list(request.prompt_token_ids or ())[:num_tokens]
        return TokenHasher(root, self._hash_tokens).prompt_hashes(tokens, len(tokens))

    def _remote(self, request: Any) -> kv_params.RemoteKV | None:
        return self._params(request).remote_kv if request.prompt_token_ids else None

    def _params(self, request: Any) -> kv_params.KVTransferParams:
        """Return what a request asks for: nothing, if its params cannot be read."""
        if not request.kv_transfer_params:
            return kv_params.KVTransferParams()
        try:
            return kv_params.from_wire(request.kv_transfer_params)
        except RequestError as error:
            _logger.warning("request %s is computed here: %s", request.request_id, error)
            return kv_params.KVTransferParams()
