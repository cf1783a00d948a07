"""A KV cache in the pools that vLLM gets from pdlaunch's connector (``get_mem_pool_context``): read
by another process, slept over, and read again.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from pdlaunch.engine.memory.pools import KV_CACHE, open_memory_pools
from pdlaunch.protocol.control import PairReady
from pdlaunch.protocol.sockets import LaunchKeys, new_launch_keys
from tests.vllm_room.test_worker import Engine, Results, begin, lend

pytestmark = [
    pytest.mark.processes,
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device"),
]
OVER_P2P = {"connector": "nixl", "nixl": {"path": "p2p"}}
DEVICE = torch.device("cuda", 0)


def prefill_twice(pipe: Connection, keys: LaunchKeys, folder: Path) -> None:
    """Main function of the other process."""
    pools = open_memory_pools(enabled=True, device=DEVICE)
    with pools.memory_pool(KV_CACHE):
        cache = torch.zeros(8, 2, 4, 16, device=DEVICE)
    prefill = Engine("prefill", keys, folder, seed=0, cache=cache, pools=pools, transfer=OVER_P2P)
    pipe.send(prefill.entry)
    for name in ("p", "q"):
        cache.copy_(torch.randn(cache.shape))
        pipe.send((lend(prefill, name, [3, 1, 2]), cache.cpu().numpy()))
        prefill.until(lambda results: bool(results.sent))
        free_bytes = torch.cuda.mem_get_info(DEVICE)[0]
        prefill.worker.sleep()
        pipe.send(torch.cuda.mem_get_info(DEVICE)[0] - free_bytes)
        pipe.recv()
        prefill.worker.wake_up()
        pipe.send("awake")
    prefill.close()


def test_a_peer_reads_the_pool_before_a_sleep_and_after_it(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings")
    context, keys = multiprocessing.get_context("spawn"), new_launch_keys()
    pipe, theirs = context.Pipe()
    process = context.Process(target=prefill_twice, args=(theirs, keys, tmp_path), daemon=True)
    process.start()
    entry = pipe.recv()
    cache = torch.zeros(8, 2, 4, 16, device=DEVICE)
    decode = Engine("decode", keys, tmp_path, seed=1, cache=cache, transfer=OVER_P2P)
    for name in ("d", "e"):
        decode.tell(entry)
        ready = decode.hear(PairReady)
        assert ready.path.rpartition("/")[2] in ("posix_fd", "fabric")
        params, expected = pipe.recv()
        begin(decode, params, [7, 0, 4], name)
        assert decode.until(lambda results: bool(results.received)) == Results(received={name})
        assert torch.equal(cache[[7, 0, 4]].cpu(), torch.as_tensor(expected)[[3, 1, 2]])
        decode.tell()  # the registry shows that prefill sleeps
        assert pipe.recv() > 0, "the device has its memory back"
        pipe.send("wake up")
        assert pipe.recv() == "awake"
    process.join(30)
    decode.close()
