"""Deaths and stops of holders with NIXL, which does not report them: the puller learns of them from
the registry and from missing answers.
"""

import os
import signal

import numpy as np
import pytest
import torch

from pdlaunch.protocol.transfer import PullDrained, PullFinished
from tests.transfer.conftest import Start
from tests.transfer.rank_process import cancel, grant, pull

pytestmark = pytest.mark.processes

BLOCKS = list(range(60))
NIXL = {"path": "nixl"}


on_each_device = pytest.mark.parametrize(
    "devices",
    [
        ("cpu", "cpu"),
        pytest.param(
            ("cuda:0", "cuda:1"),
            marks=[
                pytest.mark.multi_gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
            ],
        ),
    ],
    ids="-".join,
)


@on_each_device
@pytest.mark.parametrize("verify", [True, False])
def test_a_read_from_a_holder_that_died_before_it_brings_nothing_or_what_was_leased(
    start: Start, verify: bool, devices: tuple[str, str]
) -> None:
    """On a GPU such a READ ends as done. Then its checksums decide, or the missing answer of the
    holder.
    """
    transfer = {"nixl": NIXL, "verify": verify}
    holder, other = (
        start("prefill", index=index, transfer=transfer, device=devices[0]) for index in range(2)
    )
    puller = start("decode", transfer=transfer, device=devices[1])
    puller.connect(holder, other)
    holder.submit(grant("r", [3, 1]))
    leased = holder.blocks([3, 1])
    puller.call("interrupt", "kill before", holder.process.pid)
    puller.submit(pull("p", holder.remote("r"), [9, 2]))
    # The registry without the holder may come before or after the end of the READ.
    puller.call("registry", [other.entry()])
    finished = puller.event(PullFinished)
    if finished.ok:
        assert verify
        np.testing.assert_array_equal(puller.blocks([9, 2]), leased)
    puller.pull_from(other, "the rank goes on with the living")


def test_without_checksums_a_read_counts_when_the_holder_answers_after_it(start: Start) -> None:
    """CMA can read the memory of a stopped process. The puller would not notice its death at that
    moment.
    """
    transfer = {"nixl": NIXL, "verify": False}
    holder, puller = (start(role, transfer=transfer) for role in ("prefill", "decode"))
    puller.connect(holder)
    holder.submit(grant("r", [3, 1]), grant("s", [3, 1]))
    puller.call("interrupt", "stop", holder.process.pid)
    puller.submit(pull("p", holder.remote("r"), [9, 2]))
    puller.wait("posted")
    puller.submit(cancel("p"))
    finished = puller.event(PullFinished)
    # The READ has ended, but the pull was cancelled.
    assert (finished.ok, finished.error, finished.in_flight) == (False, "cancelled", False)
    puller.submit(pull("q", holder.remote("s"), [9, 2]))
    os.kill(holder.process.pid, signal.SIGCONT)
    assert puller.event(PullFinished).ok
    np.testing.assert_array_equal(puller.blocks([9, 2]), holder.blocks([3, 1]))


def test_blocks_of_a_read_that_never_ends_stay_the_pull_s(start: Start) -> None:
    """A READ that needs its holder stays pending forever if the holder dies in the middle: its
    blocks are never used again.
    """
    options = {
        "transfer": {"nixl": NIXL},
        # Without CMA, the holder's process copies its blocks into shared memory.
        "environment": (("UCX_TLS", "posix,self"),),
        # Blocks of 192 KiB: more than the shared memory can hold while its reader is stopped.
        **{"num_layers": 8, "head_dim": 64, "num_blocks": 64},
    }
    holder, other = (start("prefill", index=index, **options) for index in range(2))
    puller = start("decode", **options)
    puller.connect(holder, other)
    holder.submit(grant("r", BLOCKS[::-1]))
    puller.call("interrupt", "stop", holder.process.pid)
    puller.submit(pull("p", holder.remote("r"), BLOCKS))
    puller.wait("posted")
    holder.stop()
    puller.call("registry", [other.entry()])
    finished = puller.event(PullFinished)
    assert not finished.ok
    assert finished.in_flight
    assert "incarnation 1 of prefill-0/rank-0 is gone" in finished.error
    # The rank continues to work with its other blocks.
    other.submit(grant("s", [5, 6]))
    puller.submit(pull("q", other.remote("s"), [61, 62]))
    assert puller.event(PullFinished).ok
    np.testing.assert_array_equal(puller.blocks([61, 62]), other.blocks([5, 6]))
    assert not puller.has_seen(PullDrained)
