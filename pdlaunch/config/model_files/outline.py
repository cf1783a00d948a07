"""Estimates from below a model's memory in vLLM, by config.json and size of weights.

Parts of unknown size are left out, so that no model is refused that would fit.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Config = Mapping[str, Any]

_KEYS_OF_KINDS = ("layer_types", "layers_block_type", "hybrid_override_pattern", "attn_type_list")
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
_FULL = {"full_attention", "attention", "hybrid", "deepseek_sparse_attention", "*", "1"}
# Names of layers that keep a state of fixed size instead of KV
_STATES = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "M", "0"}
# Bits of a quantized weight by method, scales included
_BITS = {"fp8": 8.0, "fbgemm_fp8": 8.0, "mxfp8": 8.25, "mxfp4": 4.25, "nvfp4": 4.5}
_FEWEST_BITS = 4.0
# Bits of a weight by vLLM's flag `quantization`, for unquantized checkpoints
_ONLINE_BITS = {"fp8": 8.0, "experts_int8": 8.0, "bitsandbytes": 4.0}


class KVLayers(NamedTuple):
    """Describes one kind of layers by the KV or state that each of them keeps."""

    num_heads: int  # KV heads, split by tensor parallelism; 1 if they are latent (MLA)
    values: int  # numbers per head and token
    window: int | None = None  # tokens that are kept; None: all
    index_bytes: int = 0  # further bytes per token, of any dtype
    state_bytes: int = 0  # bytes per request, split by tensor parallelism


@dataclass(frozen=True, slots=True)
class Outline:
    """Holds the sizes from which the memory of a model's ranks is estimated."""

    layers: Mapping[KVLayers, int]  # number of layers of each kind
    embeddings: int  # parameters that no quantization shrinks
    linear: int  # parameters of other matrices, without those of experts
    expert_weights: int
    num_experts: int
    bits: float | None = None  # bits of a quantized weight; None: the checkpoint is not quantized
    experts_alone: bool = False  # only the experts are quantized
    file_bytes: int | None = None  # size of the weight files; None: unknown
    file_dtype_bytes: int = 2
    has_small_kv: bool = False  # vLLM's default for the KV cache is 8 bits

    def weight_bytes(
        self,
        dtype_bytes: int,
        tp_size: int,
        *,
        dp_size: int = 1,
        num_stages: int = 1,
        quantization: object,
        by_expert: bool,
    ) -> int | None:
        """Return the bytes of one rank's weights; None if ``quantization`` is unknown. The largest
        of ``num_stages`` pipeline stages has at least these.

        ``dp_size``: number of data parallel ranks, which share only the experts. ``by_expert``:
        each rank has whole experts (expert parallelism).
        """
        bits = self.bits
        if bits is None and quantization and not (bits := _ONLINE_BITS.get(str(quantization))):
            return None
        small = bits / 8 if bits else dtype_bytes
        experts = self.expert_weights * small
        others = self.linear * (dtype_bytes if self.experts_alone else small)
        others += self.embeddings * dtype_bytes
        scale = 1.0
        if self.file_bytes is not None and bits == self.bits:
            # Weights that are not quantized are cast to the dtype of the engine.
            loaded = self.file_bytes * (1.0 if bits else dtype_bytes / self.file_dtype_bytes)
            scale = loaded / (experts + others)
        num_experts = self.num_experts if by_expert else 0
        ranks = tp_size * dp_size
        share = math.ceil(num_experts / ranks) / num_experts if num_experts else 1 / ranks
        return int(scale * (experts * share + others / tp_size) / num_stages)

    def kv_bytes(
        self,
        num_tokens: int,
        kv_bits: int,
        tp_size: int,
        num_batched_tokens: int,
        num_stages: int = 1,
    ) -> int:
        """Return the bytes of KV and state that one rank keeps for a request."""
        total = 0
        for kind, count in self.layers.items():
            # A window slides after a step, so during the step all its new tokens are kept too.
            window = num_tokens if kind.window is None else kind.window - 1 + num_batched_tokens
            heads = max(1, kind.num_heads // tp_size)
            of_token = heads * kind.values * kv_bits // 8 + kind.index_bytes
            total += count * (min(num_tokens, window) * of_token + kind.state_bytes // tp_size)
        return total // num_stages


def outline_of(config: Config, file_bytes: int | None) -> Outline:
    """Return the outline of the language model in a config.json, whose fields are merged with those
    of its ``text_config``. Raises KeyError, TypeError and similar for an unreadable one.
    """
    hidden, quantized = config["hidden_size"], config.get("quantization_config") or {}
    kinds = _kinds(config)
    # The last layers of Gemma 4 read the KV of earlier ones.
    keeping = kinds[: len(kinds) - (config.get("num_kv_shared_layers") or 0)]
    counts = map(config.get, _NUM_EXPERTS)
    num_experts = next((n for n in counts if isinstance(n, int) and n > 1), 0)
    # An MLP has three matrices with SiLU. With other activations it may have no gate: count two.
    row = hidden * (3 if config.get("hidden_act", "silu") == "silu" else 2)
    expert = row * (config.get("moe_intermediate_size") or config["intermediate_size"])
    # Nemotron-H (hybrid_override_pattern) lists MLPs as separate layers: count none here.
    layers = range(0 if config.get("hybrid_override_pattern") else len(kinds))
    num_sparse = sum(_is_sparse(config, layer) for layer in layers) if num_experts else 0
    shared = config.get("n_shared_experts") or config.get("num_shared_experts") or 0
    shared_size = config.get("shared_expert_intermediate_size") or 0
    dense = row * config["intermediate_size"] * (len(layers) - num_sparse)
    num_heads = config["num_attention_heads"]
    attention = sum(_attention(config, kind, hidden, num_heads) for kind in kinds)
    bits, experts_alone = _bits(quantized)
    if file_bytes and (drafts := config.get("num_nextn_predict_layers")):
        # Draft layers (for speculative decoding) are in the files, but are not loaded.
        file_bytes -= int(drafts * num_experts * expert * (bits or 16) / 8)
    return Outline(
        layers=Counter(layer for kind in keeping if (layer := _kv_layer(config, kind, num_heads))),
        embeddings=config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2),
        linear=attention + dense + num_sparse * (shared * expert + row * shared_size),
        expert_weights=num_sparse * num_experts * expert,
        num_experts=num_experts,
        bits=bits,
        experts_alone=experts_alone,
        file_bytes=file_bytes,
        file_dtype_bytes=4 if "float32" in (config.get("dtype"), config.get("torch_dtype")) else 2,
        has_small_kv=bool(
            quantized.get("kv_cache_scheme")
            or quantized.get("kv_cache_quant_algo")
            or config.get("index_topk")  # vLLM's default for sparse MLA
        ),
    )


_NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")
_STEPS = (
    *("decoder_sparse_step", "interleave_moe_layer_step", "expert_layer_period"),
    *("moe_layer_frequency", "moe_layer_freq"),
)
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
# Models whose config.json does not list the layers with states
_UNKNOWN = ("mamba_d_state", "ssm_state_size", "state_size", "block_types", "mb_per_layer")


def _kinds(config: Config) -> list[str]:
    """Return the name of each layer's kind. Layers of unknown kinds are counted without KV."""
    number = config["num_hidden_layers"]
    full, other = {*range(number)}, "mamba"  # the layers with attention, and what others have
    if linear := config.get("linear_attn_config"):
        # Kimi counts layers from 1.
        full, other = {layer - 1 for layer in linear["full_attn_layers"]}, "linear_attention"
    elif kinds := next(filter(None, map(config.get, _KEYS_OF_KINDS)), None):
        return [str(kind) for kind in kinds]
    elif period := config.get("attn_layer_period"):
        full = {*range(config.get("attn_layer_offset", 0), number, period)}
    elif indices := config.get("attn_layer_indices"):
        full = {*indices}
    elif config.get("linear_num_key_heads"):
        period, other = config.get("full_attention_interval", 4), "linear_attention"
        full = {*range(period - 1, number, period)}
    elif config.get("compress_ratios") or any(map(config.get, _UNKNOWN)):
        full, other = set(), "unknown"  # compress_ratios is a field of DeepSeek-V4
    elif config.get("attention_chunk_size"):
        full, other = set(), "chunked_attention"
    elif config.get("sliding_window") and config.get("use_sliding_window", True):
        period, other = config.get("sliding_window_pattern", 0), "sliding_attention"
        full = {*range(period - 1, number, period)} if period else set()
    return ["full_attention" if layer in full else other for layer in range(number)]


def _kv_layer(config: Config, kind: str, num_heads: int) -> KVLayers | None:
    if kind in _STATES:
        return KVLayers(0, 0, state_bytes=sum(_states(config)))
    window = config.get(_WINDOWS[kind]) if kind in _WINDOWS else None
    if kind not in _FULL and window is None:
        return None
    index_bytes = config["index_head_dim"] + 4 if config.get("index_topk") else 0
    if latent := config.get("kv_lora_rank"):
        return KVLayers(1, latent + config["qk_rope_head_dim"], window, index_bytes)
    heads = 1 if config.get("multi_query") else num_heads
    heads = next(filter(None, map(config.get, _KV_HEADS)), heads)
    size = config.get("head_dim")
    if window is None and (size_of_full := config.get("global_head_dim")):  # Gemma 4
        heads, size = config.get("num_global_key_value_heads") or heads, size_of_full
    return KVLayers(heads, 2 * (size or config["hidden_size"] // num_heads), window)


def _states(config: Config) -> Iterator[int]:
    """Yield the bytes of each state of one layer, for the kinds of layers known here."""
    wide = 4 if config.get("mamba_ssm_dtype") == "float32" else 2
    if heads := config.get("linear_num_value_heads"):
        keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
        values = heads * config["linear_value_head_dim"]
        yield 2 * (2 * keys + values) * (config["linear_conv_kernel_dim"] - 1)
        yield values * config["linear_key_head_dim"] * wide
    elif linear := config.get("linear_attn_config"):
        size = linear["num_heads"] * linear["head_dim"]
        yield 2 * 3 * size * (linear["short_conv_kernel_size"] - 1) + 4 * size * linear["head_dim"]
    elif heads := config.get("mamba_num_heads") or config.get("mamba_n_heads"):
        size = config.get("mamba_head_dim") or config["mamba_d_head"]
        yield heads * size * (config.get("ssm_state_size") or config["mamba_d_state"]) * wide


def _attention(config: Config, kind: str, hidden: int, num_heads: int) -> int:
    """Return the number of parameters in one layer's attention."""
    if kind in _STATES:
        heads = config.get("linear_num_value_heads", 0)
        values = heads * config.get("linear_value_head_dim", 0)
        keys = config.get("linear_num_key_heads", 0) * config.get("linear_key_head_dim", 0)
        return int(hidden * (2 * keys + 3 * values + 2 * heads))
    if latent := config.get("kv_lora_rank"):
        rope, nope = config.get("qk_rope_head_dim", 0), config.get("qk_nope_head_dim", 0)
        size = config.get("v_head_dim", 0)
        query = num_heads * (nope + rope)
        rank = config.get("q_lora_rank")
        of_query = rank * (hidden + query) if rank else hidden * query
        of_keys = hidden * (latent + rope) + latent * num_heads * (nope + size)
        return int(of_query + of_keys + num_heads * size * hidden)
    layer = _kv_layer(config, kind, num_heads)
    if layer is None:
        return 0
    query = num_heads * layer.values // 2
    gate = query if config.get("attn_output_gate") else 0
    return int(hidden * (2 * query + gate + layer.num_heads * layer.values))


def _is_sparse(config: Config, layer: int) -> bool:
    """Return True if a layer has experts."""
    if layer in (config.get("mlp_only_layers") or ()):
        return False
    step = next(filter(None, map(config.get, _STEPS)), 1)
    if isinstance(step, list):
        return bool(step[layer])
    return bool(layer >= config.get("first_k_dense_replace", 0) and not (layer + 1) % step)


def _bits(config: Config) -> tuple[float | None, bool]:
    """Return the bits of a quantized weight, and True if only experts are quantized."""
    if not config:
        return None, False
    method = str(config.get("quant_method") or config.get("quant_algo")).lower()
    groups = [*(config.get("config_groups") or {}).values()]
    told = [config.get("bits"), config.get("w_bit")]
    told += [(group.get("weights") or {}).get("num_bits") for group in groups]
    algorithm = str(config.get("quant_algo")).lower()
    bits = _BITS.get(method) or _BITS.get(algorithm) or min(filter(None, told), default=None)
    return float(bits or _FEWEST_BITS), method == "mxfp4"
