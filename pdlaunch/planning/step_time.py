"""Bounds from below how long a step takes, from the shape of the model and the rank's device."""

from __future__ import annotations

from collections.abc import Mapping

from pdlaunch.planning.role_engines import DTypeName, RoleEngines

_FASTEST_CPU_THREAD = 100e9
_FASTEST_CPU_THREAD_BF16 = 1e12
_FASTEST_GPU: Mapping[DTypeName, float] = {
    "float32": 80e12,
    "bfloat16": 2.5e15,
    "float16": 2.5e15,
}
"""Operations a second that nothing of this kind reaches in a model: dense, without sparsity."""


def least_step_s(engines: RoleEngines) -> float | None:
    """Return the least time of a step of the whole token budget; None: the model is not known.

    Counts the multiplications with the weights of the layers alone. Attention, embeddings and the
    output layer come on top.
    """
    shape, dtype, longest = engines.shape, engines.dtype, engines.max_model_len
    if shape is None or dtype is None or longest is None:
        return None
    tokens = min(engines.max_num_batched_tokens, longest * engines.settings.max_num_seqs)
    embeddings = (1 if shape.tie_word_embeddings else 2) * shape.vocab_size * shape.hidden_size
    weights = max(0, shape.num_parameters - shape.num_idle_parameters - embeddings)
    return 2 * weights * tokens / engines.tp_size / _fastest(engines, dtype)


def _fastest(engines: RoleEngines, dtype: DTypeName) -> float:
    if engines.device == "cuda":
        return _FASTEST_GPU[dtype]
    # A CPU that emulates a type of 16 bits is no faster than in float32.
    is_native = dtype == "bfloat16" and engines.machine.has_native_bf16
    thread = _FASTEST_CPU_THREAD_BF16 if is_native else _FASTEST_CPU_THREAD
    return thread * min(engines.num_threads, engines.machine.num_cpus)
