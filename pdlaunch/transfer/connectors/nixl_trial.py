"""Tries NIXL as a rank uses it, in a process of its own: import, backend, registration of memory.

``python -P -m pdlaunch.transfer.connectors.nixl_trial [cpu|cuda:N]`` runs with a rank's environment
and prints ``imported`` and, after what UCX has to say, one line: ``ok``, ``import: WHY`` or
``refused: WHY``. Without a device only the import is tried. A rank's UCX_TLS has no transport of a
network, so nothing listens meanwhile.
"""

from __future__ import annotations

import os
import sys

import torch

from pdlaunch.transfer.connectors.nixl import load_nixl, new_agent

_MEMORY_BYTES = 1 << 20


def _try(device: str | None) -> str:
    """Return the line that is printed; whatever is raised is the answer."""
    try:
        api, bindings = load_nixl()
    except Exception as error:
        return f"import: {type(error).__name__}: {error}"
    _say("imported")
    if device is None:
        return "ok"
    try:
        memory = torch.zeros(_MEMORY_BYTES, dtype=torch.uint8, device=device)
        agent = new_agent(api, bindings, "pdlaunch-trial", "VRAM" if memory.is_cuda else "DRAM")
        agent.register_memory(memory)
    except Exception as error:
        return f"refused: {type(error).__name__}: {error}"
    return "ok"


def _say(text: str) -> None:
    sys.stdout.write(" ".join(text.split()) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _say(_try(sys.argv[1] if len(sys.argv) > 1 else None))
    # UCX's own end of a process may crash it.
    os._exit(0)
