"""Runs in vLLM's environment: its block pool and publisher, without an engine.

``publish_kv_events.py ENDPOINT DP_RANK``: publishes two batches, and one more for each line.
"""

import sys
import time

from vllm.distributed.kv_events import KVEventBatch, ZmqEventPublisher
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

BLOCK_SIZE = 16
TOKENS = list(range(100, 180))

init_none_hash(sha256_cbor)
endpoint, rank = sys.argv[1], int(sys.argv[2])
publisher = ZmqEventPublisher(rank, endpoint=endpoint, replay_endpoint=f"{endpoint}.replay")
pool = BlockPool(20, True, BLOCK_SIZE, enable_kv_cache_events=True)


def request(name: str, cache_salt: str | None = None) -> Request:
    return Request(
        name,
        TOKENS,
        SamplingParams(max_tokens=4),
        None,
        cache_salt=cache_salt,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256_cbor),
    )


def fill(whose: Request, begin: int, end: int, blocks: list[object]) -> None:
    """Have the pool cache the blocks of a request from ``begin`` to ``end``."""
    blocks += pool.get_new_blocks(end - begin)
    pool.cache_full_blocks(whose, blocks, begin, end, BLOCK_SIZE, 0)


def publish() -> None:
    publisher.publish(KVEventBatch(ts=time.time(), events=pool.take_events()))


plain, salted = list[object](), list[object]()
first = request("0")
fill(first, 0, 3, plain)
publish()
fill(first, 3, 5, plain)
publish()
sys.stdin.readline()
fill(request("1", "salt"), 0, 5, salted)
# Of the other request, the last blocks go first; one of them is left.
pool.free_blocks(reversed(plain))
pool.get_new_blocks(13)
publish()
for _ in sys.stdin:
    publish()
publisher.shutdown()
