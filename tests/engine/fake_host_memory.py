"""Host memory of a fake rank; copies end when the test says so, and the blocks they read must not
change meanwhile.
"""

from __future__ import annotations

from pdlaunch.engine.offload.jobs import JobFinished, OffloadJob
from tests.engine.fake_runner import KV, FakeRunner

BLOCK_BYTES = 100
GARBAGE: KV = (-2, -2)


class FakeHostMemory:
    """What one rank has stored: by chunk its hash, and its blocks by slot."""

    def __init__(self, runner: FakeRunner, blocks_per_chunk: int = 1) -> None:
        self.runner = runner
        self.blocks_per_chunk = blocks_per_chunk
        self.chunks: dict[int, tuple[bytes, dict[int, list[KV | None]]]] = {}
        self.sources: dict[int, list[list[KV | None]]] = {}

    def begin(self, job: OffloadJob) -> None:
        assert len(job.block_ids) == sum(job.group_sizes) == len(self._places(job))
        if job.direction == "store":
            self.sources[job.job_id] = self._read(job)
            assert all(None not in block for block in self.sources[job.job_id]), (
                "a block was stored before it was computed"
            )
            for chunk_id in job.chunk_ids:
                self.chunks.pop(chunk_id, None)
        else:
            assert [self.chunks[chunk_id][0] for chunk_id in job.chunk_ids] == job.chunk_hashes

    def scribble(self, job: OffloadJob) -> None:
        """A load in flight may write anything to its destination."""
        if job.direction == "load":
            for block_id in job.block_ids:
                self.runner.memory[block_id] = [GARBAGE] * self.runner.block_size

    def end(self, job: OffloadJob, *, ok: bool, bad_chunk_ids: list[int]) -> JobFinished:
        num_bytes = len(job.block_ids) * BLOCK_BYTES if ok else 0
        if job.direction == "store":
            source = self.sources.pop(job.job_id)
            assert self._read(job) == source, "a block was overwritten while it was stored"
            if ok:
                self.chunks |= {
                    chunk_id: (chunk_hash, {})
                    for chunk_id, chunk_hash in zip(job.chunk_ids, job.chunk_hashes, strict=True)
                }
                for block, (chunk_id, slot) in zip(source, self._places(job), strict=True):
                    self.chunks[chunk_id][1][slot] = block
        elif ok:
            for block_id, (chunk_id, slot) in zip(job.block_ids, self._places(job), strict=True):
                self.runner.memory[block_id] = list(self.chunks[chunk_id][1][slot])
        return JobFinished(job.job_id, ok, "" if ok else "broken", bad_chunk_ids, num_bytes, 0.01)

    def _places(self, job: OffloadJob) -> list[tuple[int, int]]:
        """Chunk and slot of each block."""
        chunk_ids = list(job.chunk_ids)
        places = []
        for size, first in zip(job.group_sizes, job.block_indices, strict=True):
            for index in range(first, first + size):
                slot = index % self.blocks_per_chunk
                chunk_id = chunk_ids.pop(0) if index == first or slot == 0 else places[-1][0]
                places.append((chunk_id, slot))
        assert not chunk_ids
        return places

    def _read(self, job: OffloadJob) -> list[list[KV | None]]:
        return [list(self.runner.memory[block_id]) for block_id in job.block_ids]
