from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.models.lean_worker import sums
from tests.engine.models.tiny import save_tiny_model


@pytest.mark.processes
def test_a_rank_loads_the_same_model_without_what_it_does_not_need(
    tmp_path: Path,
) -> None:
    model_dir = save_tiny_model("llama", tmp_path)
    command = [sys.executable, "-m", "tests.engine.models.lean_worker", str(model_dir)]

    worker = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)

    seen = json.loads(worker.stdout)
    assert seen["needless"] == []
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    assert seen["sums"] == sums(model)
    assert seen["picked"] == 2
    assert seen["is_one_module"]
