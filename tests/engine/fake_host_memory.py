"""Host memory of a fake rank; copies end when the test says so, and the blocks they read must not
change meanwhile.
"""

from pdlaunch.engine.offload.planner import BlockKey, JobFinished, OffloadJob
from tests.engine.fake_runner import KV, FakeRunner

BLOCK_BYTES = 100
GARBAGE: KV = (-2, -2)


class FakeHostMemory:
    """What one rank has stored: by host block its name and content."""

    def __init__(self, runner: FakeRunner) -> None:
        self.runner = runner
        self.blocks: dict[int, tuple[BlockKey, list[KV | None]]] = {}
        self.sources: dict[int, list[list[KV | None]]] = {}

    def begin(self, job: OffloadJob) -> None:
        assert job.block_ids
        if job.direction == "store":
            self.sources[job.job_id] = self._read(job)
            assert all(None not in block for block in self.sources[job.job_id]), (
                "a block was stored before it was computed"
            )
            for host_id in job.host_ids:
                self.blocks.pop(host_id, None)
        else:
            assert [self.blocks[host_id][0] for host_id in job.host_ids] == job.keys

    def scribble(self, job: OffloadJob) -> None:
        """A load in flight may write anything to its destination."""
        if job.direction == "load":
            for block_id in job.block_ids:
                self.runner.memory[block_id] = [GARBAGE] * self.runner.block_size

    def end(self, job: OffloadJob, *, ok: bool, bad_host_ids: list[int]) -> JobFinished:
        num_bytes = len(job.block_ids) * BLOCK_BYTES if ok else 0
        if job.direction == "store":
            source = self.sources.pop(job.job_id)
            assert self._read(job) == source, "a block was overwritten while it was stored"
            if ok:
                named = zip(job.keys, source, strict=True)
                self.blocks |= dict(zip(job.host_ids, named, strict=True))
        elif ok:
            for block_id, host_id in zip(job.block_ids, job.host_ids, strict=True):
                self.runner.memory[block_id] = list(self.blocks[host_id][1])
        return JobFinished(job.job_id, ok, "" if ok else "broken", bad_host_ids, num_bytes)

    def _read(self, job: OffloadJob) -> list[list[KV | None]]:
        return [list(self.runner.memory[block_id]) for block_id in job.block_ids]
