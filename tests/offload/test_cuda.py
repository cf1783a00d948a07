"""The same handler on a GPU: every copy method moves the bytes that the model moves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdlaunch.offload.copy_methods import CopyMethod, TorchCopy
from pdlaunch.offload.handler import OffloadHandler, chunk_layout
from pdlaunch.offload.host_memory import HostMemory
from pdlaunch.offload.method_choice import choose_cuda_methods, cuda_candidates
from pdlaunch.offload.spec import TransferSpec
from tests.offload.transfer_model import block_choices, geometries, host_content, model_transfer, spans
from tests.offload.waiting import Waiter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def methods() -> list[CopyMethod]:
    if not torch.cuda.is_available():
        return []
    offered = cuda_candidates()
    methods_by_name = {method.name: method for method in (*offered["load"], *offered["store"], TorchCopy())}
    return list(methods_by_name.values())


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_equals_the_model(method: CopyMethod, data: st.DataObject) -> None:
    geometry = data.draw(geometries(unit_bytes=16, max_units=8))
    groups = geometry.new_groups("cuda")
    layout = chunk_layout(groups, geometry.blocks_per_chunk)
    host = HostMemory(
        geometry.num_chunks, layout.chunk_bytes, pin=True, progress=lambda *_: None, piece_bytes=7 * layout.chunk_bytes
    )
    for piece in host.pieces:
        piece.random_(0, 256)
    waiter = Waiter()
    handler = OffloadHandler(groups, host, geometry.blocks_per_chunk, choose=lambda _copies, _way: method, wake=waiter.wake)
    expected_groups = [[tensor.cpu() for tensor in group] for group in groups]
    expected_host = host_content(host)
    sizes, indices, chunk_ids = data.draw(spans(geometry))
    for job_id, direction in enumerate(("store", "load")):
        spec = TransferSpec(direction, data.draw(block_choices(geometry, sizes)), sizes, indices, chunk_ids)
        model_transfer(spec, geometry, expected_groups, expected_host)
        handler.transfer_async(job_id, spec)
        (result,) = waiter.results(handler, 1)
        assert result.ok, result.error
    assert torch.equal(host_content(host), expected_host)
    for group, expected in zip(groups, expected_groups, strict=True):
        for tensor, wanted in zip(group, expected, strict=True):
            assert torch.equal(tensor.cpu(), wanted)
    assert handler.close()
    host.close()


def test_a_store_is_queued_behind_the_work_that_fills_its_blocks() -> None:
    pages = torch.zeros(64, 65536, dtype=torch.uint8, device="cuda")
    host = HostMemory(64, 65536, pin=True, progress=lambda *_: None)
    table = choose_cuda_methods([65536], host, pages.device)
    waiter = Waiter()
    handler = OffloadHandler([[pages]], host, 1, choose=table.choose, wake=waiter.wake)
    torch.cuda._sleep(200_000_000)
    pages.fill_(7)
    handler.transfer_async(1, TransferSpec("store", range(64), [64], [0], range(64)))
    assert handler.get_finished() == []
    (result,) = waiter.results(handler, 1)
    assert result.ok
    assert bool((host_content(host) == 7).all())
    assert handler.close()
    host.close()
