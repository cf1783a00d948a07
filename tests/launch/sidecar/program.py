"""Stands for the executable of vLLM: ``serve MODEL --uds PATH ..`` as a sidecar starts it.

Engines of one launch read from each other through the folder ``FAKE_VLLM_FOLDER``. Files there say
how an engine behaves: ``decode-0.moves_bytes`` with ``false`` in it, and the like. With pdlaunch's
connector its ranks shake hands; ``decode-0.pair_error`` says why that fails, and
``decode-0.gigabytes_per_s`` how fast they read. Without it, ``decode-0.prints`` is what an engine
prints. An engine over hosts answers nothing without its other hosts, and does not say so.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

from pdlaunch.protocol.engine_link import KV_SETUP
from tests.launch.sidecar.fake_vllm import FakeVllm, listen
from tests.launch.sidecar.fake_worker import FakeWorker, read_setup

FIELDS = ("moves_bytes", "garbles", "healthy", "has_connector", "num_running")


class FolderShares(dict[str, list[int]]):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __setitem__(self, key: str, value: list[int]) -> None:
        (self._folder / f"{key}.share").write_text(json.dumps(value))

    def pop(self, key: str) -> list[int]:
        path = self._folder / f"{key}.share"
        tokens: list[int] = json.loads(path.read_text())
        path.unlink()
        return tokens


def replace_text(path: Path, text: str) -> None:
    """Write a file that others read at any time: they find it as it was, or whole."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.new")
    unfinished.write_text(text)
    unfinished.replace(path)


def write_command(folder: Path) -> Path:
    command, root = folder / "vllm", Path(__file__).parents[3]
    program = f"{sys.executable} -m tests.launch.sidecar.program"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {program} "$@"\n')
    command.chmod(0o755)
    return command


class OtherHosts:
    def __init__(self) -> None:
        self._streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._joined = asyncio.Semaphore(0)
        self._one_at_a_time = asyncio.Lock()

    async def meet(self, address: str, port: int, number: int) -> None:
        async def take(*streams: Any) -> None:
            self._streams.append(streams)
            self._joined.release()

        self._server = await asyncio.start_server(take, address, port)
        for _ in range(number):
            await self._joined.acquire()

    async def compute(self) -> None:
        async with self._one_at_a_time:
            for reader, writer in self._streams:
                writer.write(b".")
                await reader.readexactly(1)


async def join(address: str, port: int) -> None:
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(address, port)
            while found := await reader.read(1):
                writer.write(found)
        await asyncio.sleep(0.05)


async def serve(found: argparse.Namespace, folder: Path) -> None:
    # Of a further host of the engine the path says no more than a name.
    path, tp_size = found.uds, found.tensor_parallel_size
    num_ranks = tp_size // found.nnodes
    ranks = range(found.node_rank * num_ranks, (found.node_rank + 1) * num_ranks)
    engine = FakeVllm(path.stem, FolderShares(folder))
    heed(engine, folder)
    if (printed := folder / f"{engine.name}.prints").exists():
        sys.stdout.write(json.loads(printed.read_text()))
        sys.stdout.flush()
    workers = []
    if setup := os.environ.get(KV_SETUP):
        told = {"pair_error": "", "gigabytes_per_s": 2.0}
        for field in told:
            if (file := folder / f"{engine.name}.{field}").exists():
                told[field] = json.loads(file.read_text())
        for dp_rank, tp_rank in itertools.product(range(found.data_parallel_size), ranks):
            worker = FakeWorker(read_setup(Path(setup)), tp_rank, tp_size, dp_rank)
            workers.append(asyncio.create_task(worker.shake_hands(*told.values())))
    meeting = found.master_addr, found.master_port
    if found.node_rank:
        await join(*meeting)
    if found.nnodes > 1:
        hosts = OtherHosts()
        await hosts.meet(*meeting, found.nnodes - 1)
        engine.compute = hosts.compute
    await listen(engine, path)
    while True:
        await asyncio.sleep(0.1)
        heed(engine, folder)


def heed(engine: FakeVllm, folder: Path) -> None:
    for field in FIELDS:
        told = folder / f"{engine.name}.{field}"
        if told.exists():
            setattr(engine, field, json.loads(told.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds", type=Path, default=Path("headless"))
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--data-parallel-size", type=int, default=1)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--master-addr", default="")
    parser.add_argument("--master-port", type=int, default=0)
    found, rest = parser.parse_known_args()
    folder = Path(os.environ["FAKE_VLLM_FOLDER"])
    told = {"arguments": rest, "environment": dict(os.environ), "pid": os.getpid()}
    replace_text(folder / f"{found.uds.stem}.started", json.dumps(told))
    if (folder / f"{found.uds.stem}.dies").exists():
        sys.stderr.write(
            "(EngineCore pid=7) ERROR 11-24 14:00:00 [core.py:866] ValueError: layer 3 keeps a "
            "state that cannot be proven\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n"
        )
        sys.exit(3)
    asyncio.run(serve(found, folder))


if __name__ == "__main__":
    main()
