"""A rank's imports. The program below loads a model as a rank does; nothing here may import
transformers before it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NEEDLESS = (
    "accelerate",
    "torch._dynamo.eval_frame",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)


@pytest.mark.processes
def test_a_rank_loads_a_model_without_what_it_does_not_need(tmp_path: Path) -> None:
    from tests.engine.models.tiny import save_tiny_model

    model_dir = save_tiny_model("llama", tmp_path)
    command = [sys.executable, "-m", __name__, str(model_dir)]
    worker = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(worker.stdout) == {"needless": [], "picked": 2, "is_one_module": True}


def main(model_dir: Path) -> None:
    from pdlaunch.config.model_files.shape import read_model_shape
    from pdlaunch.engine.models.lean_imports import import_lean_transformers
    from pdlaunch.engine.models.loader import ModelLoader

    import_lean_transformers()
    shape, cpu = read_model_shape(model_dir), torch.device("cpu")
    loader = ModelLoader(
        model_dir, shape, torch.float32, cpu, dummy=False, tp=None, progress=lambda *_: None
    )
    loader.load()
    needless = [name for name in NEEDLESS if name in sys.modules]

    # Whoever asks for what was left out gets it, and each module once.
    import torch._dynamo.config as by_statement
    from transformers.masking_utils import TransformGetItemToIndex

    with TransformGetItemToIndex():
        picked = torch.arange(3)[torch.tensor(2)].item()
    seen = {
        "needless": needless,
        "picked": picked,
        "is_one_module": by_statement is torch._dynamo.config,
    }
    print(json.dumps(seen))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
