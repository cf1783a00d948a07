"""Statements and proofs on a stand-in for vLLM's worker: which calls its code makes, it makes."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pdlaunch.vllm.far_statements import Answer
from pdlaunch.vllm.statements import StatementBoard, token_hash
from pdlaunch.vllm.worker import (
    FAILURES_FILE,
    MODEL_DIGEST,
    Orders,
    Prompt,
    ProvingWorker,
    StatingScheduler,
)

NUM_BLOCKS, NUM_HEADS = 12, 4
PROMPT = token_hash([1, 2, 3])


@dataclass
class Stats:
    num_failed: int = 0

    def record_failed_transfer(self) -> None:
        self.num_failed += 1


class PlainWorker:
    """Does what of NixlBaseConnectorWorker (0.32.0) the connector builds on."""

    def __init__(self, engine_id: str, tp_rank: int, tp_size: int) -> None:
        self.engine_id, self.tp_rank, self.world_size = engine_id, tp_rank, tp_size
        self.model_config = SimpleNamespace(get_total_num_kv_heads=lambda: NUM_HEADS)
        self.xfer_stats = Stats()
        self.tp_mappings: dict[str, Any] = {}
        self._recv_failures: set[str] = set()
        self._recving_metadata: dict[str, Any] = {}
        self._reqs_to_process: set[str] = set()
        self.expired: set[str] = set()
        self.read: set[str] = set()
        self.broken: set[str] = set()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.kv_caches = kv_caches

    def start_load_kv(self, metadata: Any) -> None:
        self._recving_metadata.update(metadata.reqs_to_recv)

    def _pop_done_transfers(self, transfers: Mapping[str, Any]) -> tuple[set[str], set[str]]:
        return self.read | self.broken, set(self.broken)

    def _handle_failed_transfer(
        self, req_id: str, handle: int | None, failed: set[str], **_: bool
    ) -> bool:
        failed.add(req_id)
        return True

    def _reap_expired_send_leases(self, done_sending: set[str]) -> None:
        done_sending |= self.expired

    def shutdown(self) -> None:
        pass


class Worker(ProvingWorker, PlainWorker):
    pass


@dataclass
class Pair:
    """A prefill and a decode engine, and a READ that copies tensors."""

    folder: Path
    prefill_tp: int = 1
    decode_tp: int = 1
    prefill: list[Worker] = field(default_factory=list)
    decode: list[Worker] = field(default_factory=list)
    far: Any = None

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        for name, tp_size, workers in (
            ("prefill", self.prefill_tp, self.prefill),
            ("decode", self.decode_tp, self.decode),
        ):
            for rank in range(tp_size):
                worker = Worker(StatementBoard(self.folder), self.far, name, rank, tp_size)
                shape = (NUM_BLOCKS, NUM_HEADS // tp_size, 4, 8)
                worker.register_kv_caches(
                    {f"model.layers.{layer}": torch.randn(shape) for layer in range(11)}
                )
                workers.append(worker)

    def compute(self, request: str, blocks: tuple[int, ...], prompt: str = PROMPT) -> None:
        orders = Orders(to_state={request: Prompt(prompt, blocks)})
        for worker in self.prefill:
            worker._reqs_to_process.add(request)
            worker.state_prompts(SimpleNamespace(pdlaunch=orders))

    def pull(
        self,
        request: str,
        local: tuple[int, ...],
        remote: tuple[int, ...],
        prompt: str = PROMPT,
    ) -> list[bool]:
        """READ the last blocks; return by rank whether they are used."""
        self.begin(request, local, remote, prompt)
        return [self.is_used(worker, f"d-{request}") for worker in self.decode]

    def begin(
        self,
        request: str,
        local: tuple[int, ...],
        remote: tuple[int, ...],
        prompt: str = PROMPT,
    ) -> None:
        wanted = SimpleNamespace(
            local_physical_block_ids=[list(local)] if local else [],
            remote=SimpleNamespace(
                engine_id="prefill",
                request_id=request,
                block_ids=[list(remote)],
                host="10.0.0.2",
                port=21_000,
            ),
        )
        orders = Orders(to_prove={f"d-{request}": prompt})
        for worker in self.decode:
            share = self.prefill_tp / self.decode_tp
            first = int(worker.tp_rank * share)
            sources = tuple(range(first, first + max(1, int(share))))
            worker.tp_mappings["prefill"] = SimpleNamespace(all_source_ranks=sources)
            worker.start_load_kv(
                SimpleNamespace(reqs_to_recv={f"d-{request}": wanted}, pdlaunch=orders)
            )
            self._copy(worker, local, remote[len(remote) - len(local) :])

    def _copy(self, worker: Worker, local: tuple[int, ...], remote: tuple[int, ...]) -> None:
        for name, cache in worker.kv_caches.items():
            whole = torch.cat([each.kv_caches[name] for each in self.prefill], dim=1)
            first = worker.tp_rank * NUM_HEADS // self.decode_tp
            cache[list(local)] = whole[list(remote), first : first + cache.shape[1]]

    @staticmethod
    def is_used(worker: Worker, request: str) -> bool:
        worker.read = {request}
        done, failed = worker._pop_done_transfers({})
        assert done == {request}
        assert worker.xfer_stats.num_failed == len(failed)
        return request not in failed


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(1, 1), (2, 2), (1, 2), (4, 2)])
def test_blocks_that_prefill_has_stated_are_used(
    tmp_path: Path, prefill_tp: int, decode_tp: int
) -> None:
    pair = Pair(tmp_path, prefill_tp, decode_tp)
    pair.compute("r", (4, 2, 7))
    assert pair.pull("r", (1, 5, 3), (4, 2, 7)) == [True] * decode_tp


def test_of_a_prompt_in_the_prefix_cache_the_last_blocks_are_proven(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.compute("r", (4, 2, 7))
    assert pair.pull("r", (1,), (4, 2, 7)) == [True]
    assert pair.pull("r", (), (4, 2, 7)) == [True]


@pytest.mark.parametrize("layer", [0, 2, 10])
def test_bytes_that_change_after_the_statement(tmp_path: Path, layer: int) -> None:
    pair = Pair(tmp_path, 2, 2)
    pair.compute("r", (4, 2, 7))
    pair.prefill[1].kv_caches[f"model.layers.{layer}"][2, 0, 3, 7] += 1e-6
    assert pair.pull("r", (1, 5, 3), (4, 2, 7)) == [True, False]


@pytest.mark.parametrize(
    ("request_id", "blocks", "prompt"),
    [
        ("r", (4, 2), token_hash([1, 2, 4])),
        ("r", (4, 3), PROMPT),
        ("stated by nobody", (4, 2), PROMPT),
        ("expired", (5, 6), PROMPT),
    ],
)
def test_what_prefill_does_not_state_of_these_blocks_is_not_used(
    tmp_path: Path, request_id: str, blocks: tuple[int, int], prompt: str
) -> None:
    """Another prompt, other blocks, or a lease that has expired though the bytes are there."""
    pair = Pair(tmp_path)
    pair.compute("r", (4, 2))
    pair.compute("expired", (5, 6))
    (prefill,) = pair.prefill
    prefill.expired = {"expired"}
    ended: set[str] = set()
    prefill._reap_expired_send_leases(ended)
    assert ended == {"expired"}
    assert pair.pull(request_id, (1, 5), blocks, prompt=prompt) == [False]
    pair.decode[0].xfer_stats.num_failed = 0
    assert pair.pull("r", (1, 5), (4, 2)) == [True]


def test_a_read_that_has_failed_is_left_to_vllm(tmp_path: Path) -> None:
    (worker,) = Pair(tmp_path).decode
    worker.broken = {"r"}
    assert worker._pop_done_transfers({}) == ({"r"}, {"r"})
    assert worker.xfer_stats.num_failed == 0


def test_failures_are_reported_with_the_engine_that_lent_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "failures"
    monkeypatch.setenv(FAILURES_FILE, str(file))
    pair = Pair(tmp_path)
    pair.compute("r", (4, 2))
    assert pair.pull("r", (1, 5), (4, 2)) == [True]
    assert not file.exists()
    assert pair.pull("r", (1, 5), (4, 3)) == [False]
    assert file.read_text() == "prefill\n"
    # vLLM's own: of a READ, and of a request that has left.
    failed: set[str] = set()
    (worker,) = pair.decode
    assert worker._handle_failed_transfer("d-r", None, failed, record_failed_transfer=True)
    assert worker._handle_failed_transfer("gone", None, failed)
    assert failed == {"d-r", "gone"}
    assert file.read_text() == "prefill\nprefill\n"


class Far:
    """Stands for what asks other hosts: answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.answers: list[Future[Answer]] = []

    def ask(self, *question: Any) -> Future[Answer]:
        self.asked.append(question)
        self.answers.append(Future())
        return self.answers[-1]

    def close(self) -> None:
        pass


def test_blocks_of_another_host_wait_for_what_is_stated_there(tmp_path: Path) -> None:
    """The engine goes on with its steps until it is known."""
    far = Far()
    pair = Pair(tmp_path, far=far)
    pair.compute("r", (4, 2))
    (worker,) = pair.decode
    statement = worker._board.find("prefill", 0, "r")
    for outcome, is_used in (
        ({0: statement}, True),
        ({0: None}, False),
        ("nobody knows", False),
    ):
        worker.xfer_stats.num_failed = 0
        pair.begin("r", (1, 5), (4, 2))
        worker.read = {"d-r"}
        assert worker._pop_done_transfers({}) == (set(), set())
        worker.read = set()
        assert worker._pop_done_transfers({}) == (set(), set())
        assert far.asked[-1] == ("prefill", (0,), "r", "10.0.0.2", 21_000)
        far.answers[-1].set_result(outcome)
        failed = set() if is_used else {"d-r"}
        assert worker._pop_done_transfers({}) == ({"d-r"}, failed)
        assert worker.xfer_stats.num_failed == len(failed)
        assert worker._pop_done_transfers({}) == (set(), set())


def test_a_request_that_leaves_before_it_is_known(tmp_path: Path) -> None:
    far = Far()
    pair = Pair(tmp_path, far=far)
    (worker,) = pair.decode
    pair.begin("r", (1, 5), (4, 2))
    worker.read = {"d-r"}
    worker._pop_done_transfers({})
    worker.read = set()
    worker._recving_metadata.clear()
    far.answers[-1].set_result({0: None})
    assert worker._pop_done_transfers({}) == (set(), set())


class PlainScheduler:
    """Does what of NixlPullConnectorScheduler (0.32.0) the connector builds on."""

    block_size = 4

    def __init__(self) -> None:
        self._reqs_need_recv: dict[str, Any] = {}

    def update_state_after_alloc(self, request: Any, blocks: Any, num_tokens: int) -> None:
        if request.kv_transfer_params and request.kv_transfer_params.get("do_remote_prefill"):
            self._reqs_need_recv[request.request_id] = (request, [], (), True)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return False, None

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        self._reqs_need_recv.clear()
        return SimpleNamespace()


class Scheduler(StatingScheduler, PlainScheduler):
    pass


def request_of(name: str, direction: str, tokens: list[int]) -> Any:
    return SimpleNamespace(
        request_id=name,
        kv_transfer_params={direction: True},
        prompt_token_ids=tokens,
        num_prompt_tokens=len(tokens),
        num_computed_tokens=0,
        lora_request=None,
        mm_features=[],
    )


@pytest.fixture
def scheduler() -> Scheduler:
    found = Scheduler()
    manager = SimpleNamespace(get_block_ids=lambda name: ([7, 8, 9, 10],))
    found.kv_cache_manager = manager
    return found


def orders_of(scheduler: Scheduler, **num_scheduled: int) -> Orders:
    output = SimpleNamespace(num_scheduled_tokens=num_scheduled)
    orders = scheduler.build_connector_meta(output).pdlaunch
    assert isinstance(orders, Orders)
    return orders


def test_a_prompt_is_stated_with_the_step_that_completes_it(scheduler: Scheduler) -> None:
    request = request_of("r", "do_remote_decode", list(range(9)))
    scheduler.update_state_after_alloc(request, None, 0)
    assert orders_of(scheduler, r=5).to_state == {}
    request.num_computed_tokens = 5
    assert orders_of(scheduler).to_state == {}  # a step without it
    stated = {"r": Prompt(token_hash(range(9), ("", "")), (7, 8, 9))}
    assert orders_of(scheduler, r=4).to_state == stated
    request.num_computed_tokens = 9
    assert orders_of(scheduler, r=1).to_state == {}
    request.num_computed_tokens = 0  # preempted
    assert orders_of(scheduler, r=9).to_state == stated
    scheduler.request_finished(request, None)
    assert orders_of(scheduler, r=9).to_state == {}


def test_a_prompt_that_is_pulled_is_proven_by_the_same_hash(scheduler: Scheduler) -> None:
    tokens = list(range(9))
    scheduler.update_state_after_alloc(request_of("d", "do_remote_prefill", tokens), None, 9)
    assert orders_of(scheduler).to_prove == {"d": token_hash(tokens, ("", ""))}
    assert orders_of(scheduler).to_prove == {}


def test_loras_and_inputs_beside_tokens_count(scheduler: Scheduler) -> None:
    image = SimpleNamespace(identifier="abc", mm_position=SimpleNamespace(offset=3))
    lora = SimpleNamespace(lora_name="french")
    plain = request_of("p", "do_remote_prefill", [1, 2])
    with_image = request_of("i", "do_remote_prefill", [1, 2])
    with_image.mm_features = [image]
    with_lora = request_of("l", "do_remote_prefill", [1, 2])
    with_lora.lora_request = lora
    for request in (plain, with_image, with_lora):
        scheduler.update_state_after_alloc(request, None, 2)
    assert len(set(orders_of(scheduler).to_prove.values())) == 3


def test_a_prompt_of_another_model_is_another_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    request, scheduler = request_of("r", "do_remote_decode", [1, 2, 3]), Scheduler()
    hashes = set()
    for digest in ("a", "b"):
        monkeypatch.setenv(MODEL_DIGEST, digest)
        hashes.add(scheduler._hash(request))
    assert len(hashes) == 2
