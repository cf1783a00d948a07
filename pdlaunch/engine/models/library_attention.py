"""Attention over prompts by cuDNN and by torch's flash attention, in 16 bits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

FLASH_MAX_HEAD_DIM = 256
CUDNN_MAX_HEAD_DIM = 128
CUDNN_CAPABILITY = 9
"""cuDNN's attention is twice as fast as torch's flash attention from Hopper on (measured)."""
CUDNN_PLANNED_TOKENS = 8192
"""Prompts up to this length are planned for at start; a longer one waits for its plan."""
CUDNN_STEP_TOKENS = 512
"""Prompts are padded to multiples of this: a plan for a new length takes cuDNN 45 ms."""


def attend_whole_prompts(
    lengths: list[int], stacked: torch.Tensor, num_heads: int, scaling: float
) -> torch.Tensor:
    """Attend over prompts of these lengths, one after another in ``stacked``."""
    results = []
    for heads in torch.split(stacked, lengths):
        length = len(heads)
        if padding := -length % CUDNN_STEP_TOKENS:
            padded = stacked.new_empty((length + padding, *stacked.shape[1:]))
            padded[:length] = heads
            padded[length:] = 0
            heads = padded
        # Attention is causal: no token sees the padding behind it, whose own results are cut off.
        results.append(attend_with_cudnn(heads, num_heads, scaling)[:length])
    return results[0] if len(results) == 1 else torch.cat(results)


def attend_with_cudnn(heads: torch.Tensor, num_heads: int, scaling: float) -> torch.Tensor:
    """Return the causal attention of one prompt: [num_tokens, num_heads, D].

    ``heads``: [num_tokens, num_heads + 2 * H, D]; queries, keys, values. They are always laid out
    like this, as cuDNN plans by strides too.
    """
    num_kv_heads = (heads.shape[1] - num_heads) // 2
    query, key, value = torch.split(
        heads.transpose(0, 1)[None], [num_heads, num_kv_heads, num_kv_heads], dim=1
    )
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        attended = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
    return attended[0].transpose(0, 1)


def has_fast_cudnn(device: torch.device) -> bool:
    """Return whether cuDNN's attention is the faster one on ``device``."""
    has_cudnn: bool = torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    return has_cudnn and torch.cuda.get_device_capability(device)[0] >= CUDNN_CAPABILITY


def varlen_flash() -> Callable[..., torch.Tensor]:
    """Return torch's varlen attention, which from 2.12 on is told that query heads share keys."""
    knows_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters
    attend: Any = varlen_attn  # returns a tuple only where more is asked for
    return partial(attend, enable_gqa=True) if knows_groups else attend
