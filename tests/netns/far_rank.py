"""A real rank (``tests.transfer.rank_process``) on one of the hosts.

``python -m tests.netns.far_rank SOCKET`` is its process.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from multiprocessing.connection import Client, Listener

from pdlaunch.config.connectors import KVNetwork
from pdlaunch.protocol.sockets import LaunchKeys
from tests.netns.hosts import Host
from tests.transfer.fakes import spec_of
from tests.transfer.rank_process import RankHandle, RankOptions, run_rank

PORTS = "21000-21099"


class FarRank(RankHandle):
    """The test's end of the pipe to a rank on a host."""

    def __init__(self, options: RankOptions, listener: Listener) -> None:
        self.options = options
        self._pipe = listener.accept()
        self._pipe.send(options)
        self._seen = []
        self._endpoint = ""


@contextlib.contextmanager
def far_rank(
    host: Host,
    role: str,
    keys: LaunchKeys,
    *,
    is_trusted: bool = True,
    is_ipv6: bool = False,
    **transfer: object,
) -> Iterator[FarRank]:
    """Run a rank on a host. ``transfer``: settings of ``kv_transfer``."""
    address = host.address6 if is_ipv6 else host.address
    spec = spec_of(role, name=f"{role}-0", **transfer).model_copy(
        update={"bind_address": address, "advertise_address": address}
    )
    options = RankOptions(
        spec,
        keys,
        role[0] * 32,
        num_layers=8,
        head_dim=64,
        num_blocks=64,
        network=KVNetwork(address, PORTS) if is_trusted else None,
    )
    path = f"/tmp/{role}.sock"
    with (
        Listener(str(host.file(path)), "AF_UNIX") as listener,
        host.running(sys.executable, "-m", "tests.netns.far_rank", path),
    ):
        yield FarRank(options, listener)


if __name__ == "__main__":
    pipe = Client(sys.argv[1], "AF_UNIX")
    run_rank(pipe, pipe.recv())
