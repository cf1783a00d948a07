from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from tests.transfer.pull_world import HolderRank, World


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tensors are tiny here; threads would only wait for each other."""
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
