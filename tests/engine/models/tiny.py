"""Tiny random models of every supported family, saved as directories in Hugging Face layout."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pdlaunch.config.model_files.shape import read_model_shape
from pdlaunch.engine.models.loader import ModelLoader

COMMON: dict[str, object] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

# The window of 8 is two of the tests' blocks; that of 10 ends in the middle of one.
CONFIGS: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama", "num_hidden_layers": 2},
    "llama-bias": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
    },
    "qwen2": {"model_type": "qwen2", "num_hidden_layers": 2},
    "qwen2-window": {
        "model_type": "qwen2",
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 10,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "num_hidden_layers": 2},
    "mistral": {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 8},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "sliding_window": 10,
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")],
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "smollm3-window": {
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 10,
    },
}


def save_tiny_model(name: str, folder: Path, *, seed: int = 0, **sizes: int) -> Path:
    """Weights larger than the default, so that greedy answers vary instead of repeating one token.
    ``sizes``: for COMMON ones.
    """
    settings = COMMON | sizes | CONFIGS[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(str(settings.pop("model_type")), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1 if parameter is embeddings else 8)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    directory = folder / name
    model.save_pretrained(directory)
    return directory


def loader_of(
    directory: Path, *, dummy: bool = False, dtype: torch.dtype = torch.float32
) -> ModelLoader:
    return ModelLoader(
        directory,
        read_model_shape(directory),
        dtype,
        torch.device("cpu"),
        dummy=dummy,
        tp=None,
        progress=lambda *_: None,
    )


def greedy(directory: Path, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """What transformers' own generate answers, in float32: to all prompts at once, padded on their
    left, which takes a sixth of the time.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    length = max(map(len, prompts))
    num_missing = [length - len(prompt) for prompt in prompts]
    output = model.generate(
        torch.tensor(
            [[0] * num + prompt for num, prompt in zip(num_missing, prompts, strict=True)]
        ),
        attention_mask=torch.tensor([[0] * num + [1] * (length - num) for num in num_missing]),
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    return output[:, length:].tolist()
