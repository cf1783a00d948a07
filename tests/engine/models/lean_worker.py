"""Loads a model as a rank does, with lean imports, and prints what it has seen as JSON."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch

from pdlaunch.config.model_files.shape import read_model_shape
from pdlaunch.engine.models.lean_imports import import_lean_transformers
from pdlaunch.engine.models.loader import ModelLoader

NEEDLESS = (
    "accelerate",
    "torch._dynamo.eval_frame",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)


def sums(model: torch.nn.Module) -> dict[str, float]:
    """Return the sum of each parameter and buffer."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.double().sum().item() for name, tensor in tensors}


def main(model_dir: Path) -> None:
    import_lean_transformers()
    shape = read_model_shape(model_dir)
    model = ModelLoader(
        model_dir,
        shape,
        torch.float32,
        torch.device("cpu"),
        dummy=False,
        tp=None,
        progress=lambda *_: None,
    ).load()
    needless = [name for name in NEEDLESS if name in sys.modules]

    # Whoever asks for what was left out gets it, and each module once.
    import torch._dynamo.config as by_statement
    from transformers.masking_utils import TransformGetItemToIndex

    with TransformGetItemToIndex():
        picked = torch.arange(3)[torch.tensor(2)].item()
    seen = {
        "needless": needless,
        "sums": sums(model),
        "picked": picked,
        "is_one_module": by_statement is torch._dynamo.config,
    }
    print(json.dumps(seen))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
