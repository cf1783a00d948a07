"""Any history of requests, aborts, steps, transfers and copies: no stale block is
read, none lost, each request ends once.
"""

from __future__ import annotations

import random

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.protocol.engine import SamplingParams
from tests.engine.fake_engine import FULL, FakeEngine, remote_kv, sliding
from tests.engine.fake_runner import VOCAB_SIZE, expected_output

MAX_MODEL_LEN = 40

GROUPS = st.sampled_from(
    [
        (FULL,),
        (sliding(5),),
        (sliding(1),),
        (FULL, sliding(3)),
        (FULL, sliding(8), sliding(8)),
        (FULL, FULL, sliding(4)),
    ]
)
# Few distinct tokens and a common stem make prompts that share prefixes of any length.
STEM = [random.Random(1).randrange(VOCAB_SIZE) for _ in range(30)]
PROMPTS = st.builds(
    lambda length, tail: STEM[:length] + tail,
    st.integers(0, 28),
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6),
)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 12),
    min_tokens=st.integers(0, 3),
    stop_token_ids=st.sampled_from([(), (), (2,), (1, 4)]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.0, 0.0, 1.0]),
)


class SchedulerMachine(RuleBasedStateMachine):
    """One engine that is prefill and decode engine at once."""

    def __init__(self):
        super().__init__()
        self.aborted: set[str] = set()

    @initialize(
        groups=GROUPS,
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(8, 60),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 24),
        caching=st.booleans(),
        tp_size=st.sampled_from([1, 2]),
        on_failure=st.sampled_from(["recompute", "recompute", "fail"]),
        num_chunks=st.sampled_from([0, 3, 12, 100]),
        shares_tokens=st.booleans(),
        max_beside_streams=st.sampled_from([None, 1, 5]),
    )
    def start(
        self,
        groups,
        block_size,
        num_blocks,
        max_num_seqs,
        budget,
        caching,
        tp_size,
        on_failure,
        num_chunks,
        shares_tokens,
        max_beside_streams,
    ):
        self.kv_transfer = KVTransferSettings(on_failure=on_failure)
        self.engine = FakeEngine(
            groups=groups,
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=MAX_MODEL_LEN,
            caching=caching,
            tp_size=tp_size,
            kv_transfer=self.kv_transfer,
            num_chunks=num_chunks if caching else 0,
            shares_tokens=shares_tokens,
            max_beside_streams=max_beside_streams,
        )

    def has_room(self) -> bool:
        """More at once find no other bugs, but make the way to the end long."""
        return len(self.engine.added) - len(self.engine.finished) < 12

    def new_id(self) -> str:
        return f"request-{len(self.engine.added)}"

    @precondition(lambda self: self.has_room())
    @rule(prompt=PROMPTS, sampling=SAMPLING)
    def add_plain(self, prompt, sampling):
        self.engine.add(self.new_id(), prompt, sampling=sampling)

    @precondition(lambda self: self.has_room())
    @rule(prompt=PROMPTS, sampling=SAMPLING, num_known=st.integers(1, 12))
    def add_resumed(self, prompt, sampling, num_known):
        output = (
            expected_output(prompt, sampling, max(1, MAX_MODEL_LEN - len(prompt)))[:num_known]
            if prompt
            else []
        )
        self.engine.add(self.new_id(), prompt, sampling=sampling, output=output)

    @precondition(lambda self: self.has_room())
    @rule(prompt=PROMPTS, stop=st.sampled_from([(), (1, 3, 5)]), num_choices=st.integers(1, 3))
    def add_remote_decode(self, prompt, stop, num_choices):
        sampling = SamplingParams(max_tokens=1, stop_token_ids=stop)
        name = self.new_id()
        for choice in range(num_choices):
            self.engine.add(
                f"{name}/{choice}",
                prompt,
                sampling=sampling,
                do_remote_decode=choice == 0,
                num_readers=num_choices,
            )

    @precondition(lambda self: self.has_room())
    @rule(
        prompt=PROMPTS, sampling=SAMPLING, num_choices=st.integers(1, 3), knows_first=st.booleans()
    )
    def add_remote_prefill(self, prompt, sampling, num_choices, knows_first):
        name = self.new_id()
        output = expected_output(prompt, sampling, 1) if prompt and knows_first else []
        for choice in range(num_choices):
            remote = remote_kv(name, len(prompt))
            self.engine.add(
                f"{name}/{choice}", prompt, sampling=sampling, output=output, remote_kv=remote
            )

    @rule(choice=st.randoms(use_true_random=False))
    def abort(self, choice):
        # Mostly one that lives, else the lease of one that has ended.
        living = [
            request_id for request_id in self.engine.added if request_id not in self.engine.finished
        ]
        if candidates := living * 3 + list(self.engine.leases):
            request_id = choice.choice(candidates)
            self.aborted |= {request_id} & set(living)
            self.engine.scheduler.requests.abort(request_id)
            self.engine.take_outputs()

    @rule(ahead=st.booleans())
    def step_once(self, ahead):
        self.run_ahead(ahead)
        self.engine.step()

    @rule(count=st.integers(2, 6), ahead=st.booleans())
    def step(self, count, ahead):
        self.run_ahead(ahead)
        for _ in range(count):
            self.engine.step()

    @rule()
    def collect(self):
        self.engine.collect()

    def run_ahead(self, ahead):
        self.engine.runs_ahead = ahead and self.engine.can_run_ahead

    @rule(
        choice=st.randoms(use_true_random=False),
        outcome=st.sampled_from(["ok", "ok", "ok", "failed", "failed", "in_flight", "in_flight"]),
    )
    def end_pull(self, choice, outcome):
        if self.engine.pulls:
            pull_id = choice.choice(list(self.engine.pulls))
            self.engine.end_pull(pull_id, ok=outcome == "ok", in_flight=outcome == "in_flight")

    @rule(
        choice=st.randoms(use_true_random=False),
        outcome=st.sampled_from(["ok", "ok", "ok", "failed", "bad"]),
    )
    def end_job(self, choice, outcome):
        if self.engine.jobs:
            self.engine.end_job(
                choice.choice(list(self.engine.jobs)), ok=outcome == "ok", num_bad=outcome == "bad"
            )

    @rule()
    def end_stores(self):
        for job_id, job in list(self.engine.jobs.items()):
            if job.direction == "store":
                self.engine.end_job(job_id)

    @rule(choice=st.randoms(use_true_random=False))
    def drain(self, choice):
        if self.engine.quarantined:
            self.engine.drain(choice.choice(list(self.engine.quarantined)))

    @rule(
        choice=st.randoms(use_true_random=False),
        reason=st.sampled_from(["pulled", "expired", "released"]),
    )
    def end_lease(self, choice, reason):
        if self.engine.leases:
            self.engine.end_lease(choice.choice(list(self.engine.leases)), reason)

    @invariant()
    def owners_agree(self):
        if hasattr(self, "engine"):
            self.engine.scheduler.requests.check_integrity()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.run_to_the_end()
        for request_id in self.engine.added:
            self.check_request(request_id)
        stats = self.engine.scheduler.requests.stats()
        assert stats.num_free_blocks == self.engine.num_blocks
        assert (
            stats.num_running,
            stats.num_waiting,
            stats.num_waiting_for_kv,
            stats.num_leased_requests,
        ) == (0, 0, 0, 0)
        assert (
            stats.num_leased_blocks == stats.num_quarantined_blocks == stats.num_offload_jobs == 0
        )
        assert not any(runner.rows for runner in self.engine.runners)

    def run_to_the_end(self):
        """Waiting requests need no more than the ends of those leases and pulls that exist."""
        engine = self.engine
        for _ in range(1000):
            engine.run()
            if engine.jobs:
                engine.end_job(next(iter(engine.jobs)))
            elif engine.pulls:
                engine.end_pull(next(iter(engine.pulls)))
            elif engine.quarantined:
                engine.drain(next(iter(engine.quarantined)))
            elif engine.leases:
                engine.end_lease(next(iter(engine.leases)))
            else:
                return
        raise AssertionError("transfers never end")

    def check_request(self, request_id):
        message, finished = self.engine.added[request_id], self.engine.finished[request_id]
        sampling, prompt = message.sampling, message.prompt_token_ids
        known = [token.token_id for token in message.output]
        known += self.engine.token_ids(request_id)
        limit = min(sampling.max_tokens, MAX_MODEL_LEN - len(prompt))
        if finished.reason == "error":
            assert finished.error
            return
        if message.output and limit < len(message.output):
            assert (finished.reason, finished.tokens) == ("length", []) or finished.reason == "stop"
            return
        expected = expected_output(prompt, sampling, limit)
        if finished.reason == "abort":
            assert request_id in self.aborted
            assert known == expected[: len(known)]
            return
        assert known == expected
        assert finished.reason == ("stop" if finished.stop_token_id is not None else "length")
        if finished.stop_token_id is not None:
            assert finished.stop_token_id == known[-1]
            assert known[-1] in sampling.stop_token_ids
        assert 0 <= finished.num_cached_tokens <= len(prompt)


def machine_settings(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        stateful_step_count=40,
        deadline=None,
        report_multiple_bugs=False,
        # To shrink such a history takes minutes; the one that failed is printed as it is.
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = machine_settings(150)
