"""For each rule on transport (PD5xx): a measurement that fires it, and its fixes.

Measurements are made up, so that no process is started.
"""

from dataclasses import replace

from pdlaunch.checks.context import PairTransport
from tests.checks.contexts import GPU
from tests.checks.firing import Case, Setup

PAIR = PairTransport("decode-0/rank-0", "prefill-0/rank-0", "nixl/UCX", "cuda", 390.0, 400.0)


def measured(**changes: object) -> Setup:
    return Setup(machine=GPU, measured=(replace(PAIR, **changes),))


GOOD = measured()
P2P = measured(allocator="cumem", path="p2p/cumem")

CASES = [
    Case("PD501", measured(error="REMOTE_DISCONNECT"), {"Read the error": GOOD}),
    Case(
        "PD503",
        measured(allocator="cumem", gigabytes_per_s=0.6),
        {
            "Let kv_transfer.nixl.path be auto or p2p": P2P,
            "switch expandable_segments off": GOOD,
        },
        only_on="two GPUs of a host without fabric handles",
    ),
    Case(
        "PD504",
        measured(gigabytes_per_s=12.0),
        {"so that ranks of one host use P2P": measured(path="p2p/cuda-ipc")},
        only_on="two GPUs of a host",
    ),
    Case("PD505", GOOD, {}),
    Case(
        "PD506",
        measured(hosts=("local", "node-1"), gigabytes_per_s=0.1, expected_gigabytes_per_s=None),
        {
            "Place both sides of a pair on one host": GOOD,
            "RDMA or a faster network": measured(
                hosts=("local", "node-1"), gigabytes_per_s=12.0, expected_gigabytes_per_s=None
            ),
        },
        only_on="two hosts",
    ),
]
