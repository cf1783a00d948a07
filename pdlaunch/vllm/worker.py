"""Adds statements and proofs to vLLM's NIXL connector; ``connector`` puts them onto its classes.

::

    scheduler   prompt's last chunk: to_state ─┐      blocks to pull: to_prove ─┐
    worker         forward ─ hash ─ state <────┘         READ ─ judge <─────────┘
                                                          ├─ proven: as vLLM does
                                                          └─ not: failed, so vLLM computes it
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdlaunch.vllm.far_statements import Answer, FarStatements
from pdlaunch.vllm.proof import BlockHasher, ReadBlocks, first_head, judge, new_hasher
from pdlaunch.vllm.statements import Statement, StatementBoard, token_hash
from pdlaunch.vllm.support import refused

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (
        NixlPullConnectorScheduler as SchedulerBase,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import (
        NixlPullConnectorWorker as WorkerBase,
    )
else:
    SchedulerBase = WorkerBase = object

# vLLM shows what its own loggers say.
_logger = logging.getLogger("vllm.pdlaunch")

# Path of the file that records which prefill engine a READ has failed from, for the sidecar: vLLM
# counts the READs of all prefill engines together. Unset: no record.
FAILURES_FILE = "PDLAUNCH_FAILURES_FILE"

MODEL_DIGEST = "PDLAUNCH_MODEL_DIGEST"
"""Digest of the model's files from the sidecar; blocks of another model are not used."""


@dataclass(frozen=True, slots=True)
class Prompt:
    token_hash: str
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Orders:
    """Tells workers what to do beside vLLM's own orders; travels in its metadata."""

    to_state: Mapping[str, Prompt] = field(default_factory=dict)
    to_prove: Mapping[str, str] = field(default_factory=dict)  # hash of the prompt by request


class StatingScheduler(SchedulerBase):  # type: ignore[misc]
    """Finds out which prompts are complete, and what was asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kv_cache_manager: Any = None
        # Requests whose blocks decode engines will pull, until they end.
        self._prefills: dict[str, Any] = {}

    def update_state_after_alloc(self, request: Any, *args: Any) -> None:
        super().update_state_after_alloc(request, *args)
        if (request.kv_transfer_params or {}).get("do_remote_decode"):
            self._prefills[request.request_id] = request

    def request_finished(self, request: Any, *args: Any) -> Any:
        self._prefills.pop(request.request_id, None)
        return super().request_finished(request, *args)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        orders = Orders(
            to_state=dict(self._complete_prompts(scheduler_output.num_scheduled_tokens)),
            to_prove={
                request_id: self._hash(request)
                for request_id, (request, *_) in self._reqs_need_recv.items()
            },
        )
        metadata = super().build_connector_meta(scheduler_output)
        metadata.pdlaunch = orders
        return metadata

    def _complete_prompts(self, num_scheduled_tokens: Mapping[str, int]) -> Any:
        for request_id, request in self._prefills.items():
            num_tokens = request.num_prompt_tokens
            before = request.num_computed_tokens
            # Counted before this step: a step behind the prompt must not state it again.
            if before < num_tokens <= before + num_scheduled_tokens.get(request_id, 0):
                (block_ids,) = self.kv_cache_manager.get_block_ids(request_id)
                num_blocks = -(-num_tokens // self.block_size)
                yield request_id, Prompt(self._hash(request), tuple(block_ids[:num_blocks]))

    def _hash(self, request: Any) -> str:
        lora = "" if request.lora_request is None else request.lora_request.lora_name
        inputs = [f"{each.identifier}@{each.mm_position.offset}" for each in request.mm_features]
        tokens = request.prompt_token_ids or ()
        return token_hash(tokens, (os.environ.get(MODEL_DIGEST, ""), lora, *inputs))


class ProvingWorker(WorkerBase):  # type: ignore[misc]
    """States prompts after the step that completes them; judges what was read before its use."""

    def __init__(self, board: StatementBoard, far: FarStatements | None, *args: Any) -> None:
        """``far``: finds statements of other hosts, where engines may be on several."""
        super().__init__(*args)
        self._board = board
        self._far = far
        # Answers that are waited for, by request; its READ has ended.
        self._asked: dict[str, Future[Answer]] = {}
        self._hasher: BlockHasher | None = None
        self._to_prove: dict[str, str] = {}

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        super().register_kv_caches(kv_caches)
        # A checksum goes over all layers: both sides must take them in one order, whatever order
        # vLLM names them in.
        layers = sorted(kv_caches, key=lambda name: (len(name), name))
        try:
            self._hasher = new_hasher([kv_caches[name] for name in layers])
        except ValueError as error:
            raise refused(str(error)) from error

    def start_load_kv(self, metadata: Any) -> None:
        self._to_prove.update(_orders(metadata).to_prove)
        super().start_load_kv(metadata)

    def state_prompts(self, metadata: Any) -> None:
        """State the prompts that this step has completed; called behind the forward pass."""
        for request_id, prompt in _orders(metadata).to_state.items():
            assert self._hasher is not None
            statement = Statement(
                token_hash=prompt.token_hash,
                block_ids=prompt.block_ids,
                first_head=self._first_head(),
                algorithm=self._hasher.algorithm,
                checksums=self._hasher.checksums(prompt.block_ids),
            )
            self._board.state(self.engine_id, self.tp_rank, request_id, statement)
        self._board.sweep(self._reqs_to_process)
        for request_id in self._to_prove.keys() - self._recving_metadata.keys():
            del self._to_prove[request_id]

    def shutdown(self) -> None:
        self._board.close()
        if self._far is not None:
            self._far.close()
        super().shutdown()

    def _pop_done_transfers(self, transfers: dict[str, list[Any]]) -> tuple[set[str], set[str]]:
        done, failed = super()._pop_done_transfers(transfers)
        for request_id, statements in self._stated(done, done - failed - self._recv_failures):
            if reason := self._judge(request_id, statements):
                engine_id = self._recving_metadata[request_id].remote.engine_id
                _logger.warning(
                    "KV blocks of request %s of engine %s are not used: %s; the prompt is computed "
                    "here",
                    request_id,
                    engine_id,
                    reason,
                )
                self.xfer_stats.record_failed_transfer()
                report_failure(engine_id)
                failed.add(request_id)
        return done, failed

    def _stated(self, done: set[str], read: set[str]) -> Iterator[tuple[str, Answer]]:
        """Yield the requests that were ``read`` with what is stated about them.

        Those of which it is not known yet are taken out of ``done``, and are yielded, and done, in
        a later step.
        """
        for request_id in read:
            remote = self._recving_metadata[request_id].remote
            asked = remote.engine_id, self._sources(request_id), remote.request_id
            if self._far is None:
                engine_id, ranks, name = asked
                yield request_id, {rank: self._board.find(engine_id, rank, name) for rank in ranks}
            else:
                done.discard(request_id)
                self._asked[request_id] = self._far.ask(*asked, remote.host, remote.port)
        for request_id in self._asked.keys() - self._recving_metadata.keys():
            del self._asked[request_id]
        for request_id in [name for name, answer in self._asked.items() if answer.done()]:
            done.add(request_id)
            yield request_id, self._asked.pop(request_id).result()

    def _sources(self, request_id: str) -> Sequence[int]:
        """Return the prefill ranks whose blocks a request reads; none where the prefix cache had
        all of them.
        """
        metadata = self._recving_metadata[request_id]
        if not any(metadata.local_physical_block_ids):
            return ()
        ranks: Sequence[int] = self.tp_mappings[metadata.remote.engine_id].all_source_ranks
        return ranks

    def _handle_failed_transfer(self, req_id: str, *args: Any, **options: Any) -> Any:
        metadata = self._recving_metadata.get(req_id)
        if metadata is not None and metadata.remote is not None:
            report_failure(metadata.remote.engine_id)
        return super()._handle_failed_transfer(req_id, *args, **options)

    def _reap_expired_send_leases(self, done_sending: set[str]) -> None:
        before = set(done_sending)
        super()._reap_expired_send_leases(done_sending)
        # Blocks are freed once vLLM's scheduler hears of it, which is later.
        for request_id in done_sending - before:
            self._board.withdraw(request_id)

    def _judge(self, request_id: str, statements: Answer) -> str:
        if isinstance(statements, str):
            return statements
        metadata = self._recving_metadata[request_id]
        local, remote = metadata.local_physical_block_ids, metadata.remote
        if not any(local):
            return ""  # the prefix cache had all of them
        assert self._hasher is not None
        (block_ids,) = local
        read = ReadBlocks(
            token_hash=self._to_prove.get(request_id, ""),
            remote_block_ids=tuple(remote.block_ids[0]),
            first_head=self._first_head(),
            algorithm=self._hasher.algorithm,
            checksums=self._hasher.checksums(block_ids),
        )
        return judge(read, statements)

    def _first_head(self) -> int:
        total = self.model_config.get_total_num_kv_heads()
        return first_head(total, self.world_size, self.tp_rank)


def _orders(metadata: Any) -> Orders:
    orders = getattr(metadata, "pdlaunch", None)
    return orders if isinstance(orders, Orders) else Orders()


def report_failure(engine_id: str) -> None:
    """Add a line with the id of a prefill engine. Never raises."""
    if name := os.environ.get(FAILURES_FILE):
        # One short write in append mode: the ranks of an engine write whole lines.
        with contextlib.suppress(OSError), Path(name).open("a") as file:
            file.write(f"{engine_id}\n")
