import pytest
import torch

from pdlaunch.vllm.proof import CudaHasher, new_hasher
from tests.interpreter import needs_triton, run_interpreted
from tests.vllm_room.device_hasher import check

SHAPE = (6, 2, 4, 8)  # blocks, heads, tokens of a block, content


def caches(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(SHAPE).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_each_bit_of_each_layer_counts_for_its_block_and_head_alone(dtype: torch.dtype) -> None:
    layers = caches(dtype)
    hasher = new_hasher(layers)
    before = hasher.checksums([4, 1])
    assert before.shape == (2, 2)
    for layer in layers:
        for token in (0, 3):
            flipped = layer[1, 0, token].view(torch.uint8)
            flipped[-1] ^= 128
            after = hasher.checksums([4, 1])
            assert (after != before).tolist() == [[False, False], [True, False]]
            flipped[-1] ^= 128
    assert (hasher.checksums([4, 1]) == before).all()


def test_layers_are_not_taken_for_each_other() -> None:
    layers = caches()
    swapped = [layers[1], layers[0], layers[2]]
    assert (new_hasher(layers).checksums([0]) != new_hasher(swapped).checksums([0])).all()


@pytest.mark.parametrize(
    "wrong",
    [
        [torch.zeros(6, 4, 2, 8).transpose(1, 2)],
        [torch.zeros(6, 32)],
        [torch.zeros(SHAPE), torch.zeros(6, 1, 4, 8)],
    ],
)
def test_other_layouts_are_refused(wrong: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="heads"):
        new_hasher(wrong)


@needs_triton
@pytest.mark.processes
def test_the_hasher_of_devices_by_the_interpreter() -> None:
    run_interpreted("tests.vllm_room.device_hasher")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_hasher_of_devices() -> None:
    check("cuda")


def test_a_device_refuses_heads_that_its_kernel_does_not_take() -> None:
    with pytest.raises(ValueError, match="64 bytes"):
        CudaHasher([torch.zeros(6, 2, 64, dtype=torch.uint8)])
