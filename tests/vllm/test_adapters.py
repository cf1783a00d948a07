"""LoRA adapters of real engines of vLLM, behind the router: models that requests name."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pdlaunch.config.model_files.find import resolve_model
from tests.e2e.api import complete, streamed
from tests.e2e.client import Api, Deployment, admin_api
from tests.vllm.conftest import running_engines
from tests.vllm.kv_memory import BYTES_READ, FAILED, total
from tests.vllm.test_pair import NUM_TOKENS, prompt_of

pytestmark = pytest.mark.vllm_long

RANK = 8
ADAPTER = "loud"


def write_adapter(folder: Path) -> None:
    """Write a random adapter of the demo model's keys and values, in PEFT's form.

    It changes what KV blocks hold, so that those of the base model would be wrong.
    """
    model = json.loads((resolve_model("smollm2").cache_dir / "config.json").read_text())
    draw = torch.Generator().manual_seed(1)
    hidden, out = model["hidden_size"], model["num_key_value_heads"] * model["head_dim"]
    tensors = {}
    for layer in range(model["num_hidden_layers"]):
        for name in ("k_proj", "v_proj"):
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, hidden, generator=draw) * 0.1
            tensors[f"{path}.lora_B.weight"] = torch.randn(out, RANK, generator=draw) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "smollm2",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["k_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def launch(vllm_command: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / ADAPTER)
    arguments = {"enable-lora": True, "lora-modules": [f"{ADAPTER}={folder / ADAPTER}"]}
    settings = {"engine_args": arguments, "dtype": "float32"}
    with running_engines(folder, vllm_command, settings) as deployment:
        yield deployment


def test_an_adapter_is_a_model_of_the_pair_and_its_kv_moves(launch: Deployment) -> None:
    """Of several prompts, as a lease may end while the machine is busy with others."""
    models = json.loads(Api(launch.url).get("/v1/models")[1])["data"]
    assert [model["id"] for model in models] == ["smollm2", ADAPTER]
    admin = admin_api(launch.url)
    alone, decode = admin.engine("prefill-0"), admin.engine("decode-0")
    num_used = 0
    for seed in range(400, 408):
        prompt = prompt_of(seed)
        base = complete(launch.url, prompt, NUM_TOKENS)
        before = decode.metrics()
        # Blocks of the base model are cached for the same prompt, and hold other numbers.
        told = complete(launch.url, prompt, NUM_TOKENS, model=ADAPTER)
        after = decode.metrics()
        assert told == complete(alone, prompt, NUM_TOKENS, model=ADAPTER) != base
        assert base == complete(alone, prompt, NUM_TOKENS, model="smollm2")
        has_read = total(after, BYTES_READ) > total(before, BYTES_READ)
        num_used += has_read and total(after, FAILED) == total(before, FAILED)
        if num_used == 2:
            break
    else:
        pytest.fail("no KV block of the adapter is used")
    with streamed(launch.url, prompt_of(410), NUM_TOKENS, model=ADAPTER) as tokens:
        assert list(tokens) == complete(alone, prompt_of(410), NUM_TOKENS, model=ADAPTER)
