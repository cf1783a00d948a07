"""Whether memory can be allocated from CuMem pools: a CUDA driver, and virtual memory management on
every device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from pdlaunch.platform.cuda_driver import Driver, DriverError, read_driver
from pdlaunch.platform.facts import Availability


def is_cumem_allocator_available() -> bool:
    """Never raises; ``probe_cumem`` says why not."""
    return probe_cumem().available


def probe_cumem(read: Callable[[], Driver] = read_driver) -> Availability:
    """Ask the driver; never raises."""
    try:
        return judge_cumem(read())
    except DriverError as error:
        return Availability(False, str(error))
    except Exception as error:  # A broken driver can fail in any way; the answer is still no.
        return Availability(
            False, f"the probe of the CUDA driver failed: {type(error).__name__}: {error}"
        )


def judge_cumem(driver: Driver, system: str = sys.platform) -> Availability:
    """From what the driver said."""
    if system != "linux":
        return Availability(False, f"CuMem pools need Linux; this is {system}")
    if not driver.gpus:
        return Availability(False, "cuDeviceGetCount: no CUDA device is visible")
    without = [str(gpu.index) for gpu in driver.gpus if not gpu.has_virtual_memory]
    if without:
        devices = ", ".join(without)
        return Availability(
            False, f"cuDeviceGetAttribute: no virtual memory management on device {devices}"
        )
    return Availability(True, "cuDeviceGetAttribute: virtual memory management on every device")
