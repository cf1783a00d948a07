from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from tests.transfer.fakes import spec_of
from tests.transfer.pull_world import HolderRank, World
from tests.transfer.rank_process import RankHandle, RankOptions

Start = Callable[..., RankHandle]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Use one thread: with tiny tensors, threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def holder(world: World) -> HolderRank:
    return world.connect()


@pytest.fixture
def context() -> Iterator[SecureContext]:
    context = SecureContext(new_launch_keys())
    yield context
    context.close()


@contextmanager
def starting() -> Iterator[Start]:
    """Yield a function that starts ranks of one launch, each as a process, until the block ends.
    ``transfer``: settings of ``kv_transfer``; ``options``: fields of ``RankOptions``.
    """
    keys = new_launch_keys()
    with ExitStack() as stack:

        def start(
            role: str, *, index: int = 0, tp_size: int = 1, transfer: Any = None, **options: Any
        ) -> RankHandle:
            spec = spec_of(role, name=f"{role}-{index}", tp_size=tp_size, **(transfer or {}))
            options = {"engine_id": f"{role[0]}{index}" * 16} | options
            rank = RankHandle(RankOptions(spec=spec, keys=keys, **options))
            stack.callback(rank.stop)
            return rank

        yield start


@pytest.fixture
def start() -> Iterator[Start]:
    with starting() as start:
        yield start
