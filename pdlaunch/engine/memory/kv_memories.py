"""Chooses the KV memory that fits a rank's device."""

from __future__ import annotations

import torch

from pdlaunch.engine.memory.allocator_settings import TorchAllocatorSettings
from pdlaunch.engine.memory.device_kv_memory import DeviceKVMemory
from pdlaunch.engine.memory.host_kv_memory import HostKVMemory
from pdlaunch.engine.memory.kv_memory import KVMemory, PrivateKVMemory
from pdlaunch.engine.memory.pools import MemoryPools


def open_kv_memory(
    pools: MemoryPools, device: torch.device, *, shared: bool, mapped_alone: bool = False
) -> KVMemory:
    """Return the KV memory that fits the device. With ``shared`` peers may map it.

    ``mapped_alone``: peers have no other way to it, so on a GPU it lies outside torch's expandable
    segments, which cannot be mapped; where a library may read it too, they are refused (PD204).
    """
    if device.type == "cpu":
        return HostKVMemory() if shared else PrivateKVMemory()
    allocator = TorchAllocatorSettings() if mapped_alone else None
    return DeviceKVMemory(pools, device, allocator=allocator)
