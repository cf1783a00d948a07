"""One rank of a TP group in a process of its own; answers with what it computed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import psutil
import torch

from pdlaunch.engine.models.lean_imports import import_lean_transformers
from pdlaunch.engine.models.tensor_parallel import TPGroup
from pdlaunch.engine.runner import ModelRunner
from tests.engine.real_steps import answers, ignore_progress, make_spec


def main(
    rendezvous: str,
    tp_rank: int,
    tp_size: int,
    directories: list[str],
    prompts: list[list[int]],
    num_tokens: int,
    spec: dict[str, object],
) -> None:
    """Print one line of JSON: the answers by directory, listening addresses, what the group's calls
    gave. ``spec``: changes.
    """
    torch.set_num_threads(1)
    import_lean_transformers()
    on_cuda = spec.get("device") == "cuda"
    device = f"cuda:{tp_rank}" if on_cuda else "cpu"
    tp = TPGroup(rendezvous, tp_rank, tp_size, device, timeout_s=300)
    sockets = psutil.Process().net_connections("inet")
    result = {
        "broadcast": tp.broadcast_bytes(bytes(range(tp_rank, 16 + tp_rank))).hex(),
        "least": tp.least(2**40 + 7 - tp_rank),
        "answers": {
            directory: answer(directory, tp, prompts, num_tokens, spec) for directory in directories
        },
        "listening": [entry.laddr.ip for entry in sockets if entry.status == "LISTEN"],
    }
    print(json.dumps(result), flush=True)  # noqa: T201 - the answer to the test
    if on_cuda:
        os._exit(0)  # as ranks do: graphs hold the group
    tp.close()


def answer(
    directory: str,
    tp: TPGroup,
    prompts: list[list[int]],
    num_tokens: int,
    changes: dict[str, object],
) -> dict[str, object]:
    def share(tokens: list[int]) -> list[int]:
        """All ranks pass as many bytes, of which rank 0's count."""
        return json.loads(tp.broadcast_bytes(json.dumps(tokens).encode().ljust(4096)))

    spec = make_spec(Path(directory), tensor_parallel_size=tp.tp_size, **changes)
    runner = ModelRunner(spec, tp=tp, progress=ignore_progress)
    runner.warm_up()
    return {
        "tokens": [
            answers(runner, prompts, num_tokens, step_tokens=19, apart=1, ahead=ahead, share=share)
            for ahead in (False, True)[: 1 + spec.async_scheduling]
        ],
        "num_parameters": sum(each.numel() for each in runner._model.parameters()),
        "heads": [runner.first_kv_head, runner.layout.num_kv_heads],
        "digest": runner.model_digest,
        "has_graphs": runner._graphs is not None,
    }


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
