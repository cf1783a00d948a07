"""The machine of ``test_scheduler_machine`` with a device cache so small that most of what is
shared comes from the host.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.protocol.engine import SamplingParams
from tests.engine.fake_engine import FULL, FakeEngine, sliding
from tests.engine.test_scheduler_machine import (
    MAX_MODEL_LEN,
    STEM,
    SchedulerMachine,
    machine_settings,
)


class OffloadMachine(SchedulerMachine):
    """Same rules, more loads."""

    @initialize(
        groups=st.sampled_from(
            [(FULL,), (FULL, sliding(3)), (sliding(5),), (FULL, FULL, sliding(4))]
        ),
        num_spare=st.integers(0, 4),
        budget=st.integers(4, 24),
        tp_size=st.sampled_from([1, 2]),
        num_chunks=st.sampled_from([20, 100]),
        blocks_per_chunk=st.integers(1, 3),
    )
    def start(self, groups, num_spare, budget, tp_size, num_chunks, blocks_per_chunk):
        self.engine = FakeEngine(
            groups=groups,
            num_blocks=10 * len(groups) + num_spare,
            block_size=4,
            max_num_seqs=3,
            max_num_batched_tokens=budget,
            max_model_len=MAX_MODEL_LEN,
            tp_size=tp_size,
            kv_transfer=KVTransferSettings(),
            num_chunks=num_chunks,
            blocks_per_chunk=blocks_per_chunk,
            shares_tokens=True,
        )

    @precondition(lambda self: self.has_room())
    @rule(length=st.integers(8, 28), token_id=st.integers(0, 6), max_tokens=st.integers(1, 8))
    def add_other_prompt(self, length, token_id, max_tokens):
        """Pushes the others' blocks out of the device cache."""
        sampling = SamplingParams(max_tokens=max_tokens)
        self.engine.add(self.new_id(), [token_id, *STEM[:length]], sampling=sampling)

    @rule()
    def finish_all(self):
        self.engine.run_all()

    @precondition(lambda self: any(job.direction == "load" for job in self.engine.jobs.values()))
    @rule(outcome=st.sampled_from(["ok", "failed", "bad", "abort"]))
    def end_load(self, outcome):
        job = next(job for job in self.engine.jobs.values() if job.direction == "load")
        if outcome == "abort":
            self.abort_all()
        else:
            self.engine.end_job(job.job_id, ok=outcome == "ok", num_bad=outcome == "bad")

    def abort_all(self):
        """Nobody waits for the load any more."""
        for request_id in self.engine.added.keys() - self.engine.finished.keys():
            self.aborted.add(request_id)
            self.engine.scheduler.requests.abort(request_id)
        self.engine.take_outputs()


TestOffloadMachine = OffloadMachine.TestCase
TestOffloadMachine.settings = machine_settings(60)
