"""Computes the time below which no step can go: what it must move through memory, over how fast
this device's memory is now.

A decode step reads every weight once, whatever its batch, and the keys and values of all that its
rows attend to::

    floor = (weights + batch x seen tokens x bytes of a token's keys and values) / measured bytes a
    second

- weights: all but the embedding table where the output layer has one of its own, as a step then
  reads single rows of it. Of experts as many as one token goes through: all rows may choose the
  same.
- seen tokens: the context, in layers with a sliding window at most the window.
- A prefill step reads the weights once and writes the prompt's keys and values. Its arithmetic
  takes longer than that, so its floor says little.
- The rate is the better of a plain copy, which moves each byte twice, and of adding up all numbers
  of a buffer.

Caches make it no floor for models that fit into them.
"""

from __future__ import annotations

import torch

from pdlaunch.config.model_files.shape import DTYPE_BYTES, ModelShape
from pdlaunch.engine.offload.measure import cuda_seconds, host_seconds

CPU_BUFFER_BYTES = 512 * 1024**2
"""Bytes of the buffer on a GPU, more than its caches hold."""
CUDA_BUFFER_BYTES = 2 * 1024**3


def decode_bytes(shape: ModelShape, dtype: str, *, batch_size: int, context_tokens: int) -> int:
    """Return the bytes that a decode step of ``batch_size`` rows must read."""
    seen_tokens = sum(
        context_tokens if window is None else min(context_tokens, window - 1)
        for window in shape.layer_windows
    )
    return _weight_bytes(shape, dtype) + batch_size * seen_tokens * _layer_token_bytes(shape, dtype)


def prefill_bytes(shape: ModelShape, dtype: str, *, num_tokens: int) -> int:
    """Return the bytes that a prefill step must read and write."""
    return _weight_bytes(shape, dtype) + num_tokens * shape.num_layers * _layer_token_bytes(
        shape, dtype
    )


def measure_memory_rate(device: torch.device, buffer_bytes: int | None = None) -> float:
    """Return the bytes a second that a plain copy or read moves; the better of both. Allocates a
    buffer, which torch may keep cached.
    """
    num_bytes = buffer_bytes or _buffer_bytes(device)
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    half = buffer.numel() // 2
    seconds = cuda_seconds if device.type == "cuda" else host_seconds
    # One half to the other: as many bytes read and written as a read of the whole buffer reads.
    copy_s = seconds(lambda: buffer[:half].copy_(buffer[half : 2 * half]))
    read_s = seconds(buffer.sum)
    return num_bytes / min(copy_s, read_s)


def _buffer_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_BUFFER_BYTES
    return min(CUDA_BUFFER_BYTES, torch.cuda.mem_get_info(device)[0] // 4)


def _weight_bytes(shape: ModelShape, dtype: str) -> int:
    embeddings = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    return (
        shape.parameter_bytes(dtype) - (embeddings + shape.num_idle_parameters) * DTYPE_BYTES[dtype]
    )


def _layer_token_bytes(shape: ModelShape, dtype: str) -> int:
    return 2 * shape.num_kv_heads * shape.head_dim * DTYPE_BYTES[dtype]
