"""The KV memory that fits a rank's device."""

from __future__ import annotations

import torch

from pdlaunch.memory.device_kv_memory import DeviceKVMemory
from pdlaunch.memory.host_kv_memory import HostKVMemory
from pdlaunch.memory.kv_memory import KVMemory, PrivateKVMemory
from pdlaunch.memory.pools import MemoryPools


def open_kv_memory(pools: MemoryPools, device: torch.device, *, shared: bool) -> KVMemory:
    """Return the KV memory that fits the device. With ``shared`` peers may map it; on a GPU that
    makes no difference to how it is allocated.
    """
    if device.type != "cpu":
        return DeviceKVMemory(pools, device)
    return HostKVMemory() if shared else PrivateKVMemory()
