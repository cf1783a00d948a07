"""Any history of requests, aborts, steps, transfers and copies: no stale block is read, none lost,
each request ends once.
"""

import random

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.protocol.engine import SamplingParams
from tests.engine.fake_engine import FULL, FakeEngine, remote_kv, sliding
from tests.engine.fake_runner import VOCAB_SIZE, expected_output

MAX_MODEL_LEN = 40

SETTINGS = st.fixed_dictionaries(
    {
        "groups": st.sampled_from(
            [
                (FULL,),
                (sliding(5),),
                (sliding(1),),
                (FULL, sliding(3)),
                (FULL, sliding(8), sliding(8)),
                (FULL, FULL, sliding(4)),
            ]
        ),
        "block_size": st.sampled_from([1, 2, 4]),
        "num_blocks": st.integers(8, 60),
        "max_num_seqs": st.integers(1, 5),
        "max_num_batched_tokens": st.integers(1, 24),
        "caching": st.booleans(),
        "tp_size": st.sampled_from([1, 2]),
        "kv_transfer": st.sampled_from(["recompute", "recompute", "fail"]).map(
            lambda on_failure: KVTransferSettings(on_failure=on_failure)
        ),
        "num_host": st.sampled_from([0, 3, 12, 100]),
        "shares_tokens": st.booleans(),
        "max_beside_streams": st.sampled_from([None, 1, 5]),
    }
).map(lambda found: found | ({} if found["caching"] else {"num_host": 0}))
OFFLOAD_SETTINGS = st.fixed_dictionaries(
    {
        "groups": st.sampled_from(
            [(FULL,), (FULL, sliding(3)), (sliding(5),), (FULL, FULL, sliding(4))]
        ),
        "num_blocks": st.integers(0, 4),
        "max_num_seqs": st.just(3),
        "max_num_batched_tokens": st.integers(4, 24),
        "tp_size": st.sampled_from([1, 2]),
        "num_host": st.sampled_from([20, 100]),
        "shares_tokens": st.just(True),
    }
).map(lambda found: found | {"num_blocks": 10 * len(found["groups"]) + found["num_blocks"]})
"""A device cache so small that most of what is shared comes from the host."""
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
    presence_penalty=st.sampled_from([0.0] * 4 + [1.0]),
    frequency_penalty=st.sampled_from([0.0] * 9 + [1.0]),
    repetition_penalty=st.sampled_from([1.0] * 9 + [1.2]),
)
CHOICE = st.randoms(use_true_random=False)


def some(*outcomes: str) -> st.SearchStrategy[str]:
    return st.sampled_from(["ok", "ok", "ok", *outcomes])


class SchedulerMachine(RuleBasedStateMachine):
    """One engine that is prefill and decode engine at once."""

    def __init__(self):
        super().__init__()
        self.aborted: set[str] = set()

    @initialize(found=SETTINGS)
    def start(self, found):
        self.engine = FakeEngine(max_model_len=MAX_MODEL_LEN, **found)
        self.requests = self.engine.scheduler.requests

    def has_room(self) -> bool:
        """More at once find no other bugs, but make the way to the end long."""
        return len(self.engine.added) - len(self.engine.finished) < 12

    def new_id(self) -> str:
        return f"request-{len(self.engine.added)}"

    def living(self) -> list[str]:
        return [name for name in self.engine.added if name not in self.engine.finished]

    @precondition(has_room)
    @rule(prompt=PROMPTS, sampling=SAMPLING, num_known=st.integers(0, 12))
    def add(self, prompt, sampling, num_known):
        limit = max(1, MAX_MODEL_LEN - len(prompt))
        output = expected_output(prompt, sampling, limit)[:num_known] if prompt else []
        self.engine.add(self.new_id(), prompt, sampling=sampling, output=output)

    @precondition(has_room)
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

    @precondition(has_room)
    @rule(
        prompt=PROMPTS, sampling=SAMPLING, num_choices=st.integers(1, 3), knows_first=st.booleans()
    )
    def add_remote_prefill(self, prompt, sampling, num_choices, knows_first):
        name = self.new_id()
        fields = {
            "sampling": sampling,
            "output": expected_output(prompt, sampling, 1) if prompt and knows_first else [],
            "remote_kv": remote_kv(name, len(prompt)),
        }
        for choice in range(num_choices):
            self.engine.add(f"{name}/{choice}", prompt, **dict(fields))

    @rule(choice=CHOICE)
    def abort(self, choice):
        # Mostly one that lives, else the lease of one that has ended.
        if candidates := self.living() * 3 + list(self.engine.leases):
            request_id = choice.choice(candidates)
            self.aborted |= {request_id} & {*self.living()}
            self.requests.abort(request_id)
            self.engine.take_outputs()

    @rule(count=st.integers(1, 6), ahead=st.booleans())
    def step(self, count, ahead):
        self.engine.runs_ahead = ahead and self.engine.can_run_ahead
        for _ in range(count):
            self.engine.step()

    @rule()
    def collect(self):
        self.engine.collect()

    @rule(choice=CHOICE, outcome=some("failed", "failed", "in_flight", "in_flight"))
    def end_pull(self, choice, outcome):
        if self.engine.pulls:
            pull_id = choice.choice(list(self.engine.pulls))
            self.engine.end_pull(pull_id, ok=outcome == "ok", in_flight=outcome == "in_flight")

    @rule(choice=CHOICE, outcome=some("failed", "bad"))
    def end_job(self, choice, outcome):
        if self.engine.jobs:
            job_id = choice.choice(list(self.engine.jobs))
            self.engine.end_job(job_id, ok=outcome == "ok", num_bad=outcome == "bad")

    @rule()
    def end_stores(self):
        for job_id, job in list(self.engine.jobs.items()):
            if job.direction == "store":
                self.engine.end_job(job_id)

    @rule(choice=CHOICE)
    def drain(self, choice):
        if self.engine.quarantined:
            self.engine.drain(choice.choice(list(self.engine.quarantined)))

    @rule(choice=CHOICE, reason=st.sampled_from(["pulled", "expired", "released"]))
    def end_lease(self, choice, reason):
        if self.engine.leases:
            self.engine.end_lease(choice.choice(list(self.engine.leases)), reason)

    @invariant()
    def owners_agree(self):
        if hasattr(self, "engine"):
            self.requests.check_integrity()
            tables = (pull.block_ids for pull in self.engine.quarantined.values())
            num_quarantined = sum(len(ids) for groups in tables for ids in groups)
            assert self.requests.stats().num_quarantined_blocks == num_quarantined

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.run_to_the_end()
        for request_id in self.engine.added:
            self.check_request(request_id)
        stats = self.requests.stats()
        assert stats.num_free_blocks == self.engine.num_blocks
        assert stats.num_running == stats.num_waiting == stats.num_waiting_for_kv == 0
        assert stats.num_leased_requests == stats.num_leased_blocks == 0
        assert stats.num_quarantined_blocks == stats.num_offload_jobs == 0
        assert not any(runner.rows for runner in self.engine.runners)

    def run_to_the_end(self):
        """Waiting requests need no more than the ends of those leases and pulls that exist."""
        engine = self.engine
        for _ in range(1000):
            engine.run()
            for waiting, end in (
                (engine.jobs, engine.end_job),
                (engine.pulls, engine.end_pull),
                (engine.quarantined, engine.drain),
                (engine.leases, engine.end_lease),
            ):
                if waiting:
                    end(next(iter(waiting)))
                    break
            else:
                return
        raise AssertionError("transfers never end")

    def check_request(self, request_id):
        message, finished = self.engine.added[request_id], self.engine.finished[request_id]
        sampling, prompt = message.sampling, message.prompt_token_ids
        known = [token.token_id for token in message.output]
        known += self.engine.token_ids(request_id)
        room = self.engine.scheduler.requests.max_model_len - len(prompt)
        limit = min(sampling.max_tokens, room)
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


class OffloadMachine(SchedulerMachine):
    @initialize(found=OFFLOAD_SETTINGS)
    def start(self, found):
        super().start(found)

    @precondition(SchedulerMachine.has_room)
    @rule(length=st.integers(8, 28), token_id=st.integers(0, 6), max_tokens=st.integers(1, 8))
    def add_other_prompt(self, length, token_id, max_tokens):
        """Pushes the others' blocks out of the device cache."""
        self.engine.add(self.new_id(), [token_id, *STEM[:length]], max_tokens)

    @rule()
    def finish_all(self):
        self.engine.run_all()

    @precondition(lambda self: any(job.direction == "load" for job in self.engine.jobs.values()))
    @rule(outcome=some("failed", "bad", "abort"))
    def end_load(self, outcome):
        job = next(job for job in self.engine.jobs.values() if job.direction == "load")
        if outcome != "abort":
            self.engine.end_job(job.job_id, ok=outcome == "ok", num_bad=outcome == "bad")
            return
        # Nobody waits for the load any more.
        for request_id in self.living():
            self.aborted.add(request_id)
            self.requests.abort(request_id)
        self.engine.take_outputs()


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
TestOffloadMachine = OffloadMachine.TestCase
TestOffloadMachine.settings = machine_settings(60)
