"""Copies small tensors between host and device without making the host wait."""

from collections.abc import Sequence

import torch

from pdlaunch.engine.models.attention import BoolArray, FloatArray, IntArray


class Download:
    """Copies small tensors from ``device`` to the host, after the work already queued there."""

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        self._done: torch.cuda.Event | None = None
        self._tensors = [self._begin(tensor) for tensor in tensors]
        if device.type == "cuda":
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> list[torch.Tensor]:
        if self._done is not None:
            self._done.synchronize()
        return self._tensors

    @staticmethod
    def _begin(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
            tensor, non_blocking=True
        )


def upload(
    values: Sequence[float] | Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return [len(values)] on ``device``; the host does not wait for the copy."""
    return _send(torch.tensor(values, dtype=dtype), device)


def upload_array(array: IntArray | FloatArray | BoolArray, device: torch.device) -> torch.Tensor:
    """Return the array on ``device`` without waiting; on a CPU it shares the array's memory."""
    return _send(torch.from_numpy(array), device)


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" and len(tensor)
        else tensor.to(device)
    )
