"""Pairs of vLLM that serve models of other shapes than the demo model, each tiny and random, or
split the KV heads between other numbers of ranks.

Tokens are those of one engine alone, KV blocks really move, and a bit that flips in the blocks of
any KV cache group is noticed.
"""

import random
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import AutoConfig

from pdlaunch.http.engine_calls import Counts
from tests.config.model_files.fake_hub import fake_hub
from tests.e2e.agreement import engines_of
from tests.e2e.api import complete, streamed
from tests.e2e.client import Api, Deployment
from tests.e2e.tiny_models import VOCAB_SIZE, write_model
from tests.vllm.conftest import running_engines
from tests.vllm.kv_memory import flip_bit
from tests.vllm.test_verified import Pair

NUM_TOKENS = 12
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
# Sizes that vLLM has kernels for on a CPU. With enforce_eager these rotate queries wrongly (0.32)
# where positions are not scaled, as DeepSeek's are: answers then depend on the rest of a batch.
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 64,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 0.7,
        "mscale_all_dim": 0.7,
    },
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class Model:
    family: str
    shape: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    num_groups: int = 1  # of KV caches in which bits are flipped; 0 where ranks share them
    plugin: str = ""  # module beside this file without which vLLM cannot serve it on a CPU

    def written(self, folder: Path) -> Path:
        config = AutoConfig.for_model(self.family, **{**SIZES, **self.shape})
        return write_model(config, folder / self.family)

    def environ(self, folder: Path) -> dict[str, str]:
        """Have vLLM load the plugin; return the variables for that."""
        name = self.plugin
        if not name:
            return {}
        info = folder / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        entry = f"[vllm.general_plugins]\n{name} = {name}:register\n"
        (info / "entry_points.txt").write_text(entry)
        shutil.copy(Path(__file__).with_name(f"{name}.py"), folder)
        return {"PYTHONPATH": str(folder)}


REFERENCE_MLA = {"engine_args": {"attention-backend": "CPU_MLA"}}
TWO_RANKS = {"data_parallel_size": 2, "block_size": 32}
WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
MODELS = {
    "Qwen3": Model("qwen3"),
    "Gemma 3": Model(
        "gemma3_text",
        {"num_hidden_layers": 6, "layer_types": WINDOWS, "sliding_window": 70},
        num_groups=3,
    ),
    "Qwen3 MoE": Model("qwen3_moe", {"num_experts": 4, **EXPERTS}),
    # On CPUs with AMX, vLLM would choose a backend that takes no float32.
    "DeepSeek V2": Model("deepseek_v2", {**LATENT, **EXPERTS}, REFERENCE_MLA),
    # vLLM's kernels for a CPU keep no state in the middle of a prompt, so that it finds no prefix.
    "Falcon H1": Model(
        "falcon_h1",
        {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
        {"enable_prefix_caching": False},
        num_groups=2,
    ),
    "8-bit KV": Model("llama", settings={"engine_args": {"kv-cache-dtype": "fp8"}}),
    "TP 1 and 2": Model("llama", settings={"decode": {"tensor_parallel_size": 2}}),
    "TP 2 and 1": Model("llama", settings={"prefill": {"tensor_parallel_size": 2}}, num_groups=0),
    "PP 2": Model(
        "llama", settings={"pipeline_parallel_size": 2}, num_groups=0, plugin="cpu_stages"
    ),
    "DP 2": Model("qwen3", settings=TWO_RANKS, num_groups=0),
    "DP 2 and 1": Model(
        "qwen3", settings=TWO_RANKS | {"decode": {"data_parallel_size": 1}}, num_groups=0
    ),
    "DP 2, experts": Model(
        "qwen3_moe",
        {"num_experts": 4, **EXPERTS},
        TWO_RANKS | {"engine_args": {"enable-expert-parallel": True}},
        num_groups=0,
        plugin="cpu_experts",
    ),
}
SHORT = ("Gemma 3",)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in SHORT else pytest.mark.vllm_long) for name in MODELS
    ],
)
def launch(
    request: pytest.FixtureRequest, vllm_command: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Model, Deployment]]:
    model = MODELS[request.param]
    folder = tmp_path_factory.mktemp("models")
    settings = {"model": str(model.written(folder)), "dtype": "float32", **model.settings}
    environ = model.environ(folder)
    with running_engines(folder, vllm_command, settings, environ=environ) as deployment:
        yield model, deployment


HYBRID = Model(
    "qwen3_next",
    {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "max_position_embeddings": 2048,
        "head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "shared_expert_intermediate_size": 64,
        "num_experts": 4,
        **EXPERTS,
    },
)


def prompt_of(seed: int, num_tokens: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, VOCAB_SIZE) for _ in range(num_tokens)]


def test_tokens_are_those_of_one_engine_and_kv_bytes_have_moved(
    launch: tuple[Model, Deployment],
) -> None:
    """Prompts shorter and longer than windows, that fill their last block and do not."""
    _, deployment = launch
    pair, told = Pair(deployment), []
    for seed, num_tokens in enumerate((40, 128, 301, 333)):
        prompt = prompt_of(seed, num_tokens)
        num_bytes, _ = pair.counts()
        told.append(complete(deployment.url, prompt, NUM_TOKENS))
        assert pair.counts()[0] > num_bytes
        assert told[-1] == complete(pair.prefill, prompt, NUM_TOKENS)
        # Decode continues a stream behind prefill's token, unless the model keeps states.
        prompt = prompt_of(50 + seed, num_tokens)
        with streamed(deployment.url, prompt, NUM_TOKENS) as tokens:
            assert list(tokens) == complete(pair.prefill, prompt, NUM_TOKENS)
    assert len(set(map(tuple, told))) == len(told), "KV blocks of another prompt would not show"
    assert pair.counts()[1] == 0
    assert Api(deployment.url).metrics()["pdlaunch_router_silent_recomputes_total"] == 0


def test_a_bit_that_flips_in_any_group_changes_no_token(launch: tuple[Model, Deployment]) -> None:
    model, deployment = launch
    pair = Pair(deployment)
    log = (deployment.log_dir / "prefill-0.log").read_text()
    for group in range(model.num_groups):
        prompt = prompt_of(100 + group, 300)
        expected = complete(pair.prefill, prompt, NUM_TOKENS)
        params = pair.hand_over(prompt)
        pair.await_hashes(prompt)
        assert len(params["remote_block_ids"]) == model.num_groups
        flip_bit(params, pair.worker("prefill-0"), log, -1, group=group)
        _, num_failed = pair.counts()
        assert pair.take(prompt, params) == expected
        assert pair.counts()[1] == num_failed + 1


@pytest.mark.vllm_long
@pytest.mark.parametrize("launch", ["DP 2", "DP 2, experts"], indirect=True)
def test_prompts_go_to_the_ranks_that_have_them(launch: tuple[Model, Deployment]) -> None:
    """vLLM alone would send an odd number of prompts to the other ranks when they come again."""
    _, deployment = launch
    prompts, cached = [prompt_of(seed, 200) for seed in range(20, 25)], []
    for is_known in (False, True):
        for prompt in prompts:
            complete(deployment.url, prompt, 2)
            _, told = Api(deployment.url).get_object("/pdlaunch/requests?last=1")
            cached.append((is_known, told["requests"][0]["cached_tokens"]))
        time.sleep(1.0)  # vLLM publishes events a little later
    assert cached == [(False, 0)] * 5 + [(True, 192)] * 5


@pytest.mark.vllm_long
def test_a_hybrid_finds_its_states_in_the_prefix_caches_of_both_engines(
    vllm_command: str, tmp_path: Path
) -> None:
    """vLLM's kernels for a CPU that find such states compute in bfloat16: there a step of a prompt
    and one of a token round differently, so log probabilities are compared.
    """
    settings = {"model": str(HYBRID.written(tmp_path)), "dtype": "bfloat16"}
    settings |= {"enable_prefix_caching": True}
    with running_engines(tmp_path, vllm_command, settings, "--max-model-len", "2048") as deployment:
        pair = Pair(deployment)
        # Decode finds the state at the end of a block, whose size depends on the CPU.
        metrics = Counts(pair.decode.get("/metrics")[1])
        block_size = int(metrics.label("vllm:cache_config_info", "block_size") or 0)
        prefix = prompt_of(0, 2 * block_size + 1)
        prompts = [prefix, *(prefix + prompt_of(seed, 60) for seed in range(1, 4)), prefix]
        moved, told, alone = [], [], []
        for seed, prompt in enumerate(prompts):
            num_bytes, _ = pair.counts()
            told.append(first_token(pair.decode, prompt, kv_transfer_params=pair.hand_over(prompt)))
            moved.append(pair.counts()[0] - num_bytes)
            alone.append(first_token(pair.prefill, prompt, cache_salt=f"{seed}"))
        assert [distance(*each) < 0.1 for each in zip(told, alone, strict=True)] == [True] * 5
        assert distance(alone[1], alone[2]) > 0.5, "other states would not show"
        assert moved[0] > moved[1] == moved[2] == moved[3] > moved[4] == 0
        assert pair.counts()[1] == 0
        assert pair.prefill.metrics()["vllm:prefix_cache_hits_total"] >= 2 * 2 * block_size


def first_token(api: Api, prompt: list[int], **fields: object) -> dict[str, float]:
    """Return the log probabilities of what may follow a prompt."""
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 20}
    body |= {"return_tokens_as_token_ids": True} | fields
    status, answer = api.post("/v1/completions", body)
    assert status == 200, answer
    found: dict[str, float] = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return found


def distance(one: dict[str, float], other: dict[str, float]) -> float:
    """Return by how much the likeliest tokens of one differ in the other."""
    likeliest = sorted(one, key=lambda token: -one[token])[:5]
    return max(abs(one[token] - other.get(token, -20.0)) for token in likeliest)


@pytest.mark.vllm_long
def test_engines_of_both_roles_serve_a_model_of_a_hub_that_native_engines_do_not_know(
    vllm_command: str, tmp_path: Path
) -> None:
    """pdlaunch downloads all files, because vLLM does not ask the hub itself."""
    published = MODELS["Qwen3 MoE"].written(tmp_path)
    settings = {"model": "org/tiny", "dtype": "float32", "both": {"replicas": 2}}
    with fake_hub("org/tiny", published) as hub:
        environ = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        with running_engines(tmp_path, vllm_command, settings, environ=environ) as deployment:
            router, prompt = Api(deployment.url), prompt_of(0, 40)
            assert [each["role"] for each in engines_of(router)] == ["both", "both"]
            told, *others = [complete(router, prompt, NUM_TOKENS) for _ in range(4)]
            assert others == [told] * 3
            assert router.metrics()["pdlaunch_router_fallbacks_total"] == 0
            for name in ("both-0", "both-1"):
                log = (deployment.log_dir / f"{name}.log").read_text(errors="replace")
                assert "NixlConnector" not in log
            assert "model.safetensors" in hub.asked()
