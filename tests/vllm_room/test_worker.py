"""Two workers of vLLM in this process, with a sidecar's end of their links: real transfer threads,
handshakes, leases and proofs over the connector ``file``.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import zmq

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.memory.pools import KV_CACHE, MemoryPools
from pdlaunch.errors import TransferError
from pdlaunch.protocol.control import Entry, PairFailed, PairReady, SleepState
from pdlaunch.protocol.engine_link import (
    Peers,
    PullFailure,
    RankUp,
    ToWorker,
    from_engine,
    to_worker,
)
from pdlaunch.protocol.sockets import LaunchKeys, SecureContext, new_launch_keys
from pdlaunch.protocol.transfer import CancelPull, LeaseEnded, PullDrained, PullFinished, StartPull
from pdlaunch.vllm.scheduling import GroupShape, Scheduling
from pdlaunch.vllm.worker import Results, Worker
from tests.engine.test_runner import SleepingPools
from tests.transfer.fakes import entry_of
from tests.vllm_room.test_layout import read
from tests.vllm_room.test_scheduling import PREFILL, Request, kv_setup

TIMEOUT_S = 180.0


class Engine:
    """One worker with a cache of 8 blocks of 4 tokens, and its sidecar."""

    def __init__(self, role: Any, keys: LaunchKeys, folder: Path, *, seed: int, **changes: Any):
        self.context, self.name = SecureContext(keys), f"{role}-0"
        self.link, _ = self.context.listen(zmq.ROUTER, f"ipc://{folder}/{role}.kv")
        transfer = {"connector": "file", "file": {"directory": str(folder / "kv")}}
        settings = KVTransferSettings.model_validate(transfer | changes.pop("transfer", {}))
        setup = kv_setup(
            role,
            keys=keys,
            link=f"ipc://{folder}/{role}.kv",
            kv_transfer=settings.model_dump_json(),
            model_digest=changes.pop("model_digest", "m"),
        )
        self.cache = changes.pop("cache", None)
        if self.cache is None:
            self.cache = torch.randn(8, 2, 4, 16, generator=torch.Generator().manual_seed(seed))
        layout = read({"a": self.cache}, num_blocks=8, by_head=False)
        groups = [GroupShape(4, None)]
        self.scheduling = Scheduling(setup, settings, groups, self.send, dp_rank=0, tp_size=1)
        self.worker = Worker(
            setup,
            layout,
            dp_rank=0,
            tp_rank=0,
            tp_size=1,
            dtype="float32",
            vllm_version=changes.pop("vllm_version", "0.32.0"),
            pools=changes.pop("pools", MemoryPools()),
        )
        self.heard: list[Any] = []
        up = self.hear(RankUp)
        self.entry = entry_of(self.name, role, up.engine_id, up.side_channel, state="ready")

    def hear(self, kind: type) -> Any:
        deadline_at = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_at:
            for message in self.heard:
                if isinstance(message, kind):
                    self.heard.remove(message)
                    return message
            if self.link.poll(100):
                self.heard.append(from_engine.decode(self.link.recv_multipart()[1]))
        raise AssertionError(f"no {kind.__name__}, but {self.heard}")

    def tell(self, *entries: Entry) -> None:
        self.send(Peers(entries=list(entries)))

    def send(self, message: ToWorker) -> None:
        self.link.send_multipart([self.entry.name.encode(), to_worker.encode(message)])

    def step(self) -> None:
        self.worker.submit(self.scheduling.take_commands())

    def until(self, done: Callable[[Results], bool]) -> Results:
        deadline_at, all_of_it = time.monotonic() + TIMEOUT_S, Results()
        while not done(all_of_it):
            assert time.monotonic() < deadline_at, all_of_it
            time.sleep(0.005)
            now = self.worker.take()
            for name in ("sent", "received", "failed", "bad_blocks"):
                getattr(all_of_it, name).update(getattr(now, name))
        return all_of_it

    def close(self) -> None:
        self.worker.close()
        self.context.close()


Start = Callable[..., Engine]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    keys, engines = new_launch_keys(), []

    def start_one(role: str, **changes: Any) -> Engine:
        engines.append(Engine(role, keys, tmp_path, seed=len(engines), **changes))
        return engines[-1]

    yield start_one
    for engine in engines:
        engine.close()


def lend(prefill: Engine, name: str, blocks: list[int]) -> Any:
    request = Request(name, 10, PREFILL)
    params = prefill.scheduling.finished(request, (blocks,), is_prefilled=True)
    prefill.step()
    return params


def begin(decode: Engine, params: Any, blocks: list[int], name: str = "d") -> Request:
    request = Request(name, 10, params)
    assert decode.scheduling.num_matched(request, 0) == 10
    decode.scheduling.allocated(request, (blocks,), 10)
    decode.step()
    return request


def paired(start: Start, **changes: Any) -> tuple[Engine, Engine]:
    prefill, decode = start("prefill", **changes), start("decode", **changes)
    decode.tell(prefill.entry)
    assert decode.hear(PairReady).peer == "prefill-0/rank-0"
    return prefill, decode


def test_blocks_arrive_proven_and_their_lease_ends(start: Start) -> None:
    prefill, decode = paired(start)
    begin(decode, lend(prefill, "p", [3, 1, 2]), [7, 0, 4])
    assert decode.until(lambda results: bool(results.received)) == Results(received={"d"})
    assert torch.equal(decode.cache[[7, 0, 4]], prefill.cache[[3, 1, 2]])
    assert prefill.until(lambda results: bool(results.sent)) == Results(sent={"p"})
    figures = decode.worker.take_figures()
    assert (figures["kv_transfers"], figures["kv_transfer_failures"]) == (1, 0)
    assert figures["kv_transfer_bytes"] == 3 * prefill.cache[0].nbytes
    assert decode.worker.take_figures() == {}


def test_a_visit_ends_the_lease_and_is_no_result(start: Start) -> None:
    prefill, decode = paired(start)
    request = Request("d", 10, lend(prefill, "p", [3, 1, 2]))
    decode.scheduling.finished(request, ([],), is_prefilled=False)
    decode.step()
    assert prefill.until(lambda results: bool(results.sent)).sent == {"p"}
    assert decode.worker.take() == Results()


def test_a_lease_begins_and_ends_once_though_its_grant_comes_twice(start: Start) -> None:
    """At once, and with vLLM's next step, which may be long."""
    prefill, decode = paired(start)
    request = Request("p", 10, PREFILL)
    params = prefill.scheduling.finished(request, ([3, 1, 2],), is_prefilled=True)
    begin(decode, params, [7, 0, 4])
    assert decode.until(lambda results: bool(results.received)) == Results(received={"d"})
    assert prefill.until(lambda results: bool(results.sent)).sent == {"p"}
    prefill.step()
    begin(decode, lend(prefill, "q", [3, 1, 2]), [7, 0, 4], "e")
    assert decode.until(lambda results: bool(results.received)) == Results(received={"e"})
    assert prefill.until(lambda results: bool(results.sent)).sent == {"q"}


def test_a_lease_that_has_ended_is_counted_and_is_no_doubt_of_its_pair(start: Start) -> None:
    prefill, decode = paired(start, transfer={"lease_s": 0.2})
    params = lend(prefill, "p", [3, 1, 2])
    assert prefill.until(lambda results: bool(results.sent)).sent == {"p"}
    assert prefill.worker.take_figures() == {"kv_leases_expired": 1}
    begin(decode, params, [7, 0, 4])
    assert decode.until(lambda results: bool(results.received)).failed == {"d"}
    assert decode.worker.take_figures()["kv_transfer_failures"] == 1
    begin(decode, params | {"remote_request_id": "never"}, [7, 0, 4], "e")
    assert decode.until(lambda results: bool(results.received)).failed == {"e"}
    assert "request never has no lease here" in decode.hear(PullFailure).error


def test_wrong_bytes_are_never_used(start: Start) -> None:
    prefill, decode = paired(start)
    params = lend(prefill, "p", [3, 1, 2])
    # Once the next lease is granted, the first one is hashed.
    begin(decode, lend(prefill, "q", [5, 6, 4]), [5, 6, 1], "e")
    decode.until(lambda results: bool(results.received))
    prefill.cache[1, 1, 3] += 1
    begin(decode, params, [7, 0, 4])
    results = decode.until(lambda results: bool(results.received))
    assert results == Results(received={"d"}, failed={"d"}, bad_blocks={7, 0, 4})
    assert "checksum" in decode.hear(PullFailure).error
    assert decode.worker.take_figures()["kv_verification_failures"] == 1


def test_an_aborted_request_is_received_once(start: Start) -> None:
    """vLLM ends the whole engine at a second report."""
    prefill, decode = paired(start)
    request = begin(decode, lend(prefill, "p", [3, 1, 2]), [7, 0, 4])
    decode.scheduling.finished(request, ([7, 0, 4],), is_prefilled=False)
    decode.step()
    assert decode.until(lambda results: bool(results.received)).received == {"d"}
    time.sleep(0.1)
    assert decode.worker.take() == Results()


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"model_digest": "other"}, "model_digest"), ({"vllm_version": "0.31.0"}, "layout")],
)
def test_a_wrong_pair_fails_before_traffic(start: Start, changes: Any, field: str) -> None:
    prefill, decode = start("prefill"), start("decode", **changes)
    decode.tell(prefill.entry)
    failed = decode.hear(PairFailed)
    assert failed.fatal
    assert f"{field}: decode-0/rank-0 has" in failed.error


def test_an_engine_sleeps_once_nothing_is_leased_and_is_read_again_when_awake(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM calls both methods twice where it sleeps at two levels."""
    pools = SleepingPools()
    prefill, decode = start("prefill", pools=pools), start("decode")
    decode.tell(prefill.entry)
    decode.hear(PairReady)
    params = lend(prefill, "p", [3, 1, 2])
    with monkeypatch.context() as patch:
        patch.setattr("pdlaunch.vllm.worker.SLEEP_TIMEOUT_S", 0.3)
        with pytest.raises(TransferError, match="has not ended"):
            prefill.worker.sleep()
    assert not pools.sleeping_tags, "a leased block is not slept over"
    begin(decode, params, [7, 0, 4])
    assert decode.until(lambda results: bool(results.received)) == Results(received={"d"})
    prefill.until(lambda results: bool(results.sent))
    for _ in range(2):
        prefill.worker.sleep()
    assert pools.sleeping_tags == {KV_CACHE}
    assert prefill.hear(SleepState).state == "sleeping"
    decode.tell()
    for _ in range(2):
        prefill.worker.wake_up()
    assert prefill.hear(SleepState).state == "awake"
    decode.tell(prefill.entry)
    decode.hear(PairReady)
    prefill.cache[:] = torch.randn(prefill.cache.shape)
    begin(decode, lend(prefill, "q", [5, 6, 1]), [1, 2, 3], "e")
    assert decode.until(lambda results: bool(results.received)) == Results(received={"e"})
    assert torch.equal(decode.cache[[1, 2, 3]], prefill.cache[[5, 6, 1]])


def test_blocks_of_a_read_that_cannot_be_taken_back_are_not_given_back(start: Start) -> None:
    engine = start("decode")
    engine.worker.close()
    engine.worker._transfer = transfer = Mock()
    request = Request("d", 10, lend(engine, "p", [1, 2, 3]))
    engine.scheduling.num_matched(request, 0)
    engine.scheduling.allocated(request, ([7, 0, 4],), 10)
    commands = engine.scheduling.take_commands()
    assert isinstance(commands[0], StartPull)
    engine.worker.submit([*commands, CancelPull(pull_id="other")])
    late = PullFinished(pull_id="d", ok=False, error="late", in_flight=True)
    transfer.take_events.return_value = [late, LeaseEnded(lease_id="p", reason="expired")]
    assert engine.worker.take() == Results(sent={"p"})
    drained = [PullDrained(pull_id="d"), PullDrained(pull_id="unknown")]
    transfer.take_events.return_value = drained
    assert engine.worker.take() == Results(received={"d"}, failed={"d"}, bad_blocks={7, 0, 4})
