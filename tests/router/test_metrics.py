from __future__ import annotations

from pdlaunch.protocol.control import PairReady
from pdlaunch.router.metrics import RouterMetrics

NAME = "pdlaunch_pair_gigabytes_per_second"


def pair(local: str, path: str, speed: float) -> PairReady:
    return PairReady(
        local=local,
        peer="prefill-0/rank-0",
        peer_incarnation=1,
        seconds=0.1,
        path=path,
        gigabytes_per_s=speed,
    )


def test_pairs_are_shown_with_the_path_in_use_and_go_with_their_ranks() -> None:
    metrics = RouterMetrics("m")
    metrics.show_pairs(
        [pair("decode-0/rank-0", "p2p/memfd", 9.5), pair("decode-1/rank-0", "nixl/UCX", 2.5)]
    )
    lines = [line for line in metrics.text().decode().splitlines() if line.startswith(NAME)]
    assert lines == [
        f'{NAME}{{holder="prefill-0/rank-0",path="p2p/memfd",puller="decode-0/rank-0"}} 9.5',
        f'{NAME}{{holder="prefill-0/rank-0",path="nixl/UCX",puller="decode-1/rank-0"}} 2.5',
    ]
    metrics.show_pairs([pair("decode-1/rank-0", "p2p/memfd", 8.0)])
    lines = [line for line in metrics.text().decode().splitlines() if line.startswith(NAME)]
    assert lines == [
        f'{NAME}{{holder="prefill-0/rank-0",path="p2p/memfd",puller="decode-1/rank-0"}} 8.0'
    ]


def test_pairs_of_gpus_are_shown_by_the_copies_in_use() -> None:
    metrics = RouterMetrics("m")
    metrics.show_pairs(
        [
            pair("decode-0/rank-0", "p2p/posix_fd/batch1", 391.7),
            pair("decode-0/rank-1", "nixl/UCX", 0.583),
        ]
    )
    lines = [line for line in metrics.text().decode().splitlines() if line.startswith(NAME)]
    assert lines == [
        f'{NAME}{{holder="prefill-0/rank-0",path="p2p/posix_fd/batch1",'
        'puller="decode-0/rank-0"} 391.7',
        f'{NAME}{{holder="prefill-0/rank-0",path="nixl/UCX",puller="decode-0/rank-1"}} 0.583',
    ]
