"""A scheduler with fake ranks, a fake connector and fake host memory, and the checks that hold
after every step.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.grammar import Grammars
from pdlaunch.engine.kvcache.groups import KVCacheGroup
from pdlaunch.engine.kvcache.hashing import TokenHasher, root_hash
from pdlaunch.engine.leader import RankReports
from pdlaunch.engine.lifecycle import RequestLifecycle
from pdlaunch.engine.offload.planner import HostTier, JobFinished, OffloadJob, OffloadPlanner
from pdlaunch.engine.scheduler import Scheduler
from pdlaunch.engine.step import StepPlan
from pdlaunch.protocol.engine import (
    AddRequest,
    EngineStats,
    RequestFinished,
    SamplingParams,
    Tokens,
)
from pdlaunch.protocol.kv_events import HeldBlocks
from pdlaunch.protocol.kv_params import RemoteKV, TokenOutput
from pdlaunch.protocol.transfer import (
    CancelPull,
    EndLease,
    GrantLease,
    LeaseEnded,
    PullDrained,
    PullFinished,
    StartPull,
    TransferCommand,
    TransferEvent,
)
from tests.engine.fake_host_memory import FakeHostMemory
from tests.engine.fake_runner import KV, FakeRunner, FakeStep, expected_output, extend_chain
from tests.engine.real_steps import make_spec

FULL = KVCacheGroup((0,), None)
SPEC = make_spec(
    "unused", max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, block_size=4
)
GARBAGE: KV = (-1, -1)
PROMPT = [1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
"""Two full blocks of 4 tokens and half a block."""


def sliding(window: int) -> KVCacheGroup:
    return KVCacheGroup((0,), window)


def output(prompt: list[int], max_tokens: int, **fields: object) -> list[int]:
    return expected_output(prompt, SamplingParams(max_tokens=max_tokens, **fields), max_tokens)  # type: ignore[arg-type]


def stop_at_first(prompt: list[int], max_tokens: int = 4) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, stop_token_ids=(output(prompt, 1)[0],))


def remote_kv(request_id: str, num_tokens: int, engine_id: str = "p") -> RemoteKV:
    return RemoteKV(
        engine_id=engine_id,
        lease_id=request_id,
        host="127.0.0.1",
        port=1,
        block_ids=[],
        num_tokens=num_tokens,
    )


def make_scheduler(
    spec: EngineSpec = SPEC,
    groups: Sequence[KVCacheGroup] = (FULL,),
    num_blocks: int = 16,
    offload: OffloadPlanner | None = None,
    max_beside_streams: int | None = None,
    grammars: Grammars | None = None,
) -> Scheduler:
    requests = RequestLifecycle(
        spec,
        groups,
        num_blocks,
        model_digest="model",
        engine_id="local-engine",
        port=5,
        grammars=grammars or Grammars(Path(), 0, ()),
        offload=offload,
    )
    return Scheduler(requests, max_beside_streams)


class FakeEngine:
    """``step`` is the step loop; pulls, leases and offload jobs end when the test says so.

    With ``runs_ahead`` a turn leaves one step in flight, if it can be followed up before its tokens
    are known.
    """

    def __init__(
        self,
        *,
        groups: Sequence[KVCacheGroup] = (FULL,),
        num_blocks: int = 32,
        caching: bool = True,
        tp_size: int = 1,
        num_host: int = 0,
        runs_ahead: bool = False,
        shares_tokens: bool = False,
        max_beside_streams: int | None = None,
        **settings: object,
    ) -> None:
        """``shares_tokens``: other ranks get what rank 0 draws at once, without which they cannot
        run ahead. ``num_host``: room of the host tier, which needs ``caching``; 0: there is
        none. ``settings``: of an EngineSpec.
        """
        own = {"enable_prefix_caching": caching, "tensor_parallel_size": tp_size}
        spec = SPEC.model_copy(update=own | settings)
        self.groups = groups
        self.num_blocks = num_blocks
        self.block_size = size = spec.block_size
        planner = OffloadPlanner(groups, size, HostTier(num_host)) if num_host else None
        self.scheduler = make_scheduler(spec, groups, num_blocks, planner, max_beside_streams)
        self.runners = [
            FakeRunner(groups, num_blocks, spec, expects=tp_rank > 0 and shares_tokens)
            for tp_rank in range(tp_size)
        ]
        self.runners[0].samples = True
        self.can_run_ahead = shares_tokens or tp_size == 1
        self.host = [FakeHostMemory(runner) for runner in self.runners]
        self.runs_ahead = runs_ahead
        self.in_flight: deque[tuple[StepPlan, list[FakeStep]]] = deque()
        self.num_ahead = 0
        self.merger = RankReports(tp_size)
        self.jobs: dict[int, OffloadJob] = {}
        self.loads: list[OffloadJob] = []
        self.added: dict[str, AddRequest] = {}
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.finished: dict[str, RequestFinished] = {}
        self.pulls: dict[str, StartPull] = {}
        self.quarantined: dict[str, StartPull] = {}
        self.told = HeldBlocks()
        self.leases: dict[str, tuple[GrantLease, list[list[list[KV | None]]]]] = {}

    def add(
        self, request_id: str, prompt: Sequence[int], max_tokens: int = 4, **fields: object
    ) -> None:
        sampling = fields.pop("sampling", None) or SamplingParams(max_tokens=max_tokens)
        output = [TokenOutput(token_id=token_id) for token_id in fields.pop("output", ())]  # type: ignore[attr-defined]
        message = AddRequest(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling=sampling,
            output=output,
            **fields,
        )  # type: ignore[arg-type]
        assert request_id not in self.added
        self.added[request_id] = message
        self.outputs[request_id] = []
        self.scheduler.requests.add(message)
        self.take_outputs()

    def step(self) -> StepPlan:
        """One turn of the step loop. Transfers that may still write do so at the worst moments."""
        ahead = self.scheduler.schedule_ahead() if self.runs_ahead and self.in_flight else None
        if ahead is not None:
            self.num_ahead += 1
            self._launch(ahead)
            self._collect_oldest()
            return ahead
        self.collect()
        plan = self.scheduler.schedule()
        self._launch(plan)
        if not self.runs_ahead:
            self.collect()
        return plan

    def collect(self) -> None:
        while self.in_flight:
            self._collect_oldest()

    def _launch(self, plan: StepPlan) -> None:
        self.scheduler.requests.check_integrity()
        self._submit(plan)
        self._scribble()
        steps = [runner.launch(plan) for runner in self.runners]
        if plan.scheduled:
            self.in_flight.append((plan, steps))
        else:
            self.take_outputs()

    def _collect_oldest(self) -> None:
        plan, steps = self.in_flight.popleft()
        self._scribble()
        output = self.runners[0].collect(steps[0])
        for runner, step in zip(self.runners[1:], steps[1:], strict=True):
            runner.collect(step, output)
        self._scribble()
        self.scheduler.postprocess(plan, output)
        self.scheduler.requests.check_integrity()
        self._check_leases()
        if self.in_flight:
            self._submit(self.scheduler.hand_over())
        self.take_outputs()

    def _submit(self, plan: StepPlan) -> None:
        for command in plan.commands:
            self._on_command(command)
        for job in plan.jobs:
            self._begin_job(job)

    def run(self, max_steps: int = 20_000) -> list[StepPlan]:
        plans = []
        while self.scheduler.has_work():
            plans.append(self.step())
            assert len(plans) < max_steps, "no end in sight"
        idle = self.scheduler.schedule()
        assert idle == StepPlan(step_id=idle.step_id), "has_work was silent about this"
        return plans

    def take_outputs(self) -> None:
        if (change := self.scheduler.requests.take_blocks()) is not None:
            self.told.apply(change)
        for item in self.scheduler.requests.take_outputs():
            assert item.request_id not in self.finished, "a request that has ended says more"
            self.outputs[item.request_id].extend(item.tokens)
            if isinstance(item, RequestFinished):
                self.finished[item.request_id] = item
            else:
                assert isinstance(item, Tokens)

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.requests.stats()

    def token_ids(self, request_id: str) -> list[int]:
        return [token.token_id for token in self.outputs[request_id]]

    def end_pull(self, pull_id: str, *, ok: bool = True, in_flight: bool = False) -> None:
        pull = self.pulls.pop(pull_id)
        if ok:
            self._write_pulled(pull)
        if in_flight:
            self.quarantined[pull_id] = pull
        error = "" if ok else "broken"
        self._tell(PullFinished(pull_id=pull_id, ok=ok, in_flight=in_flight, error=error))

    def drain(self, pull_id: str) -> None:
        del self.quarantined[pull_id]
        self._tell(PullDrained(pull_id=pull_id))

    def end_lease(self, request_id: str, reason: str = "pulled") -> None:
        del self.leases[request_id]
        self._tell(LeaseEnded(lease_id=request_id, reason=reason))

    def _tell(self, event: TransferEvent) -> None:
        self.scheduler.requests.on_transfer_event(event)
        self.scheduler.requests.check_integrity()
        self.take_outputs()

    def end_job(self, job_id: int, *, ok: bool = True, num_bad: int = 0) -> None:
        """The copy ends, on one rank with a fault unless ``ok``; ``num_bad`` host blocks of a load
        are found to be wrong.
        """
        job = self.jobs.pop(job_id)
        for tp_rank, host in enumerate(self.host):
            fails = not ok and tp_rank == job_id % len(self.host)
            bad_host_ids = job.host_ids[:num_bad] if fails else []
            merged = self.merger.add(host.end(job, ok=not fails, bad_host_ids=bad_host_ids))
        assert isinstance(merged, JobFinished)
        assert merged.ok == ok
        self.scheduler.requests.on_job_finished(merged)
        self.scheduler.requests.check_integrity()
        self.take_outputs()

    def end_jobs(self) -> None:
        while self.jobs:
            self.end_job(next(iter(self.jobs)))

    def run_all(self) -> list[StepPlan]:
        plans = self.run()
        while self.jobs:
            self.end_jobs()
            plans += self.run()
        return plans

    def _on_command(self, command: TransferCommand) -> None:
        match command:
            case GrantLease():
                assert command.lease_id not in self.leases
                self._check_granted(command)
                self.leases[command.lease_id] = (command, self._snapshot(command))
            case StartPull():
                assert command.pull_id not in self.pulls.keys() | self.quarantined.keys()
                self._check_pull(command)
                self.pulls[command.pull_id] = command
            case EndLease() | CancelPull():
                pass  # what they ask for may have ended while they were on their way

    def _begin_job(self, job: OffloadJob) -> None:
        self.jobs[job.job_id] = job
        if job.direction == "load":
            self.loads.append(job)
        for host in self.host:
            host.begin(job)

    def _check_granted(self, grant: GrantLease) -> None:
        """The leased blocks hold what the last prompt token sees."""
        request = self.added[grant.lease_id]
        assert grant.block_hashes == self._hashes(request)
        chain = extend_chain([], request.prompt_token_ids)
        for group, kind in enumerate(self.groups):
            start = 0 if kind.sliding_window is None else max(0, len(chain) - kind.sliding_window)
            assert grant.first_block_index[group] == start // self.block_size
            for position in range(start, len(chain)):
                index = position // self.block_size - grant.first_block_index[group]
                for runner in self.runners:
                    found = runner.memory[grant.block_ids[group][index]][position % self.block_size]
                    assert found == (group, chain[position])

    def _check_pull(self, pull: StartPull) -> None:
        request = self.added[pull.request_id]
        assert pull.block_hashes == self._hashes(request)
        assert pull.num_tokens == len(request.prompt_token_ids)
        num_blocks = -(-pull.num_tokens // self.block_size)
        for group, kind in enumerate(self.groups):
            assert pull.first_block_index[group] + len(pull.block_ids[group]) == num_blocks
            seen = (
                0
                if kind.sliding_window is None
                else max(0, pull.num_tokens - kind.sliding_window) // self.block_size
            )
            assert pull.first_block_index[group] >= seen, "the holder does not lease these blocks"

    def _hashes(self, request: AddRequest) -> list[bytes]:
        hasher = TokenHasher(root_hash("model", cache_salt=request.cache_salt), self.block_size)
        return hasher.prompt_hashes(request.prompt_token_ids, len(request.prompt_token_ids))

    def _write_pulled(self, pull: StartPull) -> None:
        chain = extend_chain([], self.added[pull.request_id].prompt_token_ids)
        for group, block_ids in enumerate(pull.block_ids):
            for index, block_id in enumerate(block_ids, pull.first_block_index[group]):
                for slot, link in enumerate(
                    chain[index * self.block_size : (index + 1) * self.block_size]
                ):
                    for runner in self.runners:
                        runner.memory[block_id][slot] = (group, link)

    def _scribble(self) -> None:
        """A READ in flight may write anything to its destination at any time."""
        for pull in [*self.pulls.values(), *self.quarantined.values()]:
            for block_ids in pull.block_ids:
                for block_id in block_ids:
                    for runner in self.runners:
                        runner.memory[block_id] = [GARBAGE] * self.block_size
        for job in self.jobs.values():
            for host in self.host:
                host.scribble(job)

    def _snapshot(self, grant: GrantLease) -> list[list[list[KV | None]]]:
        memory = self.runners[0].memory
        return [[list(memory[block_id]) for block_id in block_ids] for block_ids in grant.block_ids]

    def _check_leases(self) -> None:
        for grant, snapshot in self.leases.values():
            assert self._snapshot(grant) == snapshot, "leased blocks were overwritten"
