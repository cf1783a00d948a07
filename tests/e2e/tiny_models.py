"""Tiny random models of every supported family, as directories in Hugging Face layout with a
byte-level tokenizer.
"""

import random
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

VOCAB_SIZE = 256
# For TP 2; vLLM on a CPU needs a head size of at least 32.
TWO_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 128}
HEADS = {
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "hidden_size": 48,
    "intermediate_size": 96,
}
COMMON = HEADS | {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"num_hidden_layers": 3},
    "qwen2": {"num_hidden_layers": 3},
    "qwen3": {"num_hidden_layers": 3},
    "mistral": {"num_hidden_layers": 3, "sliding_window": 24},
    "gemma3_text": {
        "num_hidden_layers": 6,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    },
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
}


def make_tiny_model(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    max_model_len: int = 512,
    vocab_size: int = VOCAB_SIZE,
    **heads: int,
) -> Path:
    """Write config, weights and tokenizer of a tiny random model; return its directory."""
    sizes = COMMON | {"vocab_size": vocab_size, "max_position_embeddings": max_model_len} | heads
    config = AutoConfig.for_model(family, **sizes, **FAMILIES[family])
    return write_model(config, folder / family, seed=seed)


def write_model(config: PretrainedConfig, directory: Path, *, seed: int = 0) -> Path:
    """Write a random model with this config; return its directory."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Larger weights than the default, so that greedy answers do not repeat one token.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(directory)
    make_tokenizer(config.vocab_size).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}'
    )
    return directory


def make_tokenizer(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A tokenizer with a token for each byte. It decodes further tokens, but never encodes one."""
    words = [
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(f"<{index}>" for index in range(VOCAB_SIZE, vocab_size)),
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make_prompts(seed: int, lengths: Iterable[int]) -> list[list[int]]:
    """Random prompts of these lengths, without special tokens."""
    draw = random.Random(seed).randrange
    return [[draw(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def greedy(directory: Path, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The answers of transformers' own generate, one prompt at a time, in float32."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers
