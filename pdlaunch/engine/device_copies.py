"""Small copies between host and device that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Download:
    """Copies of small tensors of ``device``, begun behind the work that is queued there. On a CPU there is nothing to copy."""

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        self._done: torch.cuda.Event | None = None
        self._tensors = [self._begin(tensor) for tensor in tensors]
        if device.type == "cuda":
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host, as they were when the copy was begun; all work queued before it is done."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors

    @staticmethod
    def _begin(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def upload(values: Sequence[float] | Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[len(values)] on ``device``; the host does not wait for the copy, as it would for that of ``torch.tensor``."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and len(values) else tensor.to(device)
