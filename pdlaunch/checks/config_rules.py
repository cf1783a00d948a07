"""Rules PD1xx judge settings that contradict each other or the model."""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.http_names import is_loopback
from pdlaunch.config.roles import PAIR

CUDA_BLOCK_STEP_TOKENS = 16


@rule(
    "PD101",
    "error",
    fix="Set prefill.replicas and decode.replicas, or both.replicas, to 1 or more.",
    source="The plan of a launch.",
    on_vllm=True,
)
def no_engine(context: Context) -> Iterator[Found]:
    """There is no engine at all.

    Nothing can answer a request.
    """
    if not context.engines:
        yield Found(
            "prefill.replicas", "prefill.replicas, decode.replicas and both.replicas are all 0"
        )


@rule(
    "PD102",
    "error",
    fix="Give both roles at least one engine, or neither, and `both` some.",
    source="The plan of a launch.",
    on_vllm=True,
)
def role_without_peer(context: Context) -> Iterator[Found]:
    """There are prefill engines without decode engines, or the other way round.

    Prefill hands its KV blocks to decode: without a peer nothing is handed over, and one role does
    the work of both.
    """
    present_roles = [role for role in PAIR if role in context.engines]
    if len(present_roles) == 1:
        (present,) = present_roles
        absent = next(role for role in PAIR if role != present)
        count = context.engines[present].replicas
        yield Found(
            f"{absent}.replicas",
            f"{count} {present} engine{'' if count == 1 else 's'}, but no {absent} engine",
        )


@rule(
    "PD103",
    "error",
    fix="Name an alias, a directory in Hugging Face layout, or a .gguf file of a supported family.",
    source="The model's own config.json.",
    needs=("model_files",),
    on_vllm=True,
)
def model_unusable(context: Context) -> Iterator[Found]:
    """The model cannot be found or cannot be served.

    Every engine would end while it loads the model.
    """
    for engine in context.engines.values():
        if engine.model.error is not None:
            yield Found(engine.where("model"), str(engine.model.error), engine.model.error.fix)


@rule(
    "PD104",
    "error",
    fix="Choose a tensor_parallel_size that divides both numbers.",
    source="Megatron-style tensor parallelism.",
    needs=("model",),
    on_vllm=True,
)
def tp_splits_heads(context: Context) -> Iterator[Found]:
    """tensor_parallel_size does not divide the attention heads of the model.

    Tensor parallelism gives every rank the same number of attention heads, and an equal part of the
    inner size.
    """
    for engine, shape in context.shapes():
        numbers = {
            "attention heads": shape.num_attention_heads,
            "intermediate_size": shape.intermediate_size,
        }
        for name, number in numbers.items():
            if number % engine.tp_size:
                yield Found(
                    engine.where("tensor_parallel_size"),
                    (
                        f"tensor_parallel_size {engine.tp_size} does not divide the model's "
                        f"{number} {name}"
                    ),
                )


@rule(
    "PD105",
    "error",
    fix="Choose a tensor_parallel_size that divides the number of KV heads, or a multiple of it.",
    source="pdlaunch's KV layout: heads first, one region a head.",
    needs=("model",),
    on_vllm=True,
)
def tp_splits_kv_heads(context: Context) -> Iterator[Found]:
    """tensor_parallel_size does not fit the KV heads of the model.

    A rank holds whole KV heads. They are shared out evenly, or each is replicated on equally many
    ranks; nothing else works.
    """
    for engine, shape in context.shapes():
        heads, size = shape.num_kv_heads, engine.tp_size
        if heads % size and size % heads:
            sizes = [
                str(n)
                for n in range(1, heads + 1)
                if heads % n == 0 and shape.num_attention_heads % n == 0
            ]
            yield Found(
                engine.where("tensor_parallel_size"),
                f"tensor_parallel_size {size} does not fit the model's {heads} KV heads",
                f"choose {', '.join(sizes)} or a multiple of {heads}",
            )


@rule(
    "PD106",
    "error",
    fix="Lower max_model_len, or leave it out.",
    source="max_position_embeddings of the model's config.json.",
    needs=("model",),
    on_vllm=True,
)
def max_len_over_model(context: Context) -> Iterator[Found]:
    """max_model_len is longer than the model was made for.

    Positions beyond max_position_embeddings have no meaning to the model: it answers with noise.
    """
    for engine, shape in context.shapes():
        wanted, limit = engine.settings.max_model_len, shape.max_position_embeddings
        if wanted is not None and wanted > limit:
            message = f"max_model_len {wanted} is over the model's {limit} positions"
            yield Found(
                engine.where("max_model_len"),
                message,
                f"set it to {limit} or less, or leave it out",
            )


@rule(
    "PD108",
    "error",
    fix="Use a multiple of 16; 64 or 128 move faster.",
    source="The paged variants of FlashAttention.",
    needs=("gpus",),
    on_vllm=True,
)
def block_size_not_allowed(context: Context) -> Iterator[Found]:
    """block_size is not allowed by the attention backend of the device.

    Paged attention kernels on CUDA read the KV cache in tiles of 16 tokens.
    """
    for engine in context.on("cuda"):
        size = engine.settings.block_size
        if size % CUDA_BLOCK_STEP_TOKENS:
            message = (
                f"block_size {size} is no multiple of {CUDA_BLOCK_STEP_TOKENS}, which CUDA needs"
            )
            rounded = max(1, round(size / CUDA_BLOCK_STEP_TOKENS)) * CUDA_BLOCK_STEP_TOKENS
            yield Found(engine.where("block_size"), message, f"set it to {rounded}")


@rule(
    "PD109",
    "warning",
    fix="Lower block_size.",
    source="pdlaunch's KV cache.",
    needs=("model",),
)
def block_longer_than_request(context: Context) -> Iterator[Found]:
    """A KV block is longer than the longest request.

    Only whole blocks are cached, leased and handed over in full: with one block a request the
    prefix cache finds nothing.
    """
    for engine in context.engines.values():
        longest = engine.max_model_len
        if longest is not None and engine.settings.block_size > longest:
            message = (
                f"block_size {engine.settings.block_size} is over the longest request of {longest} "
                "tokens"
            )
            yield Found(engine.where("block_size"), message)


@rule(
    "PD110",
    "warning",
    fix="Raise max_num_batched_tokens, or lower max_num_seqs.",
    source="Continuous batching.",
)
def budget_below_batch(context: Context) -> Iterator[Found]:
    """The token budget of a step is smaller than the largest batch.

    A decode step computes one token for every running request: requests beyond the budget wait,
    whatever max_num_seqs says.
    """
    for engine in context.engines.values():
        budget, batch = engine.max_num_batched_tokens, engine.settings.max_num_seqs
        if budget < batch:
            message = f"max_num_batched_tokens {budget} is less than max_num_seqs {batch}"
            yield Found(engine.where("max_num_batched_tokens"), message)


@rule(
    "PD123",
    "warning",
    fix="Raise limits.max_queued_requests, or lower max_num_seqs.",
    source="The router's admission.",
)
def router_admits_too_few(context: Context) -> Iterator[Found]:
    """The router admits fewer requests than the engines can run at once.

    Clients get 429 while engines have free seats.
    """
    admitted = context.config.limits.max_queued_requests
    seats = sum(
        engine.replicas * engine.settings.max_num_seqs
        for role, engine in context.engines.items()
        if role != "prefill"
    )
    if admitted < seats:
        message = f"{admitted} requests are let in, the engines can run {seats} at once"
        yield Found("limits.max_queued_requests", message)


@rule(
    "PD111",
    "warning",
    fix="Remove kv_transfer.verify: off; it is meant for measuring.",
    source="NIXL 1.5.1: a READ of deregistered memory ends as DONE (measured).",
    on_vllm=True,
)
def not_verified(context: Context) -> Iterator[Found]:
    """Pulled KV blocks are not verified.

    Without checksums a block that was overwritten while it was read is used, and the answer is
    wrong with HTTP 200.
    """
    if context.pair() and not context.config.kv_transfer.verify:
        yield Found(
            "kv_transfer.verify",
            "kv_transfer.verify is off: wrong KV blocks would be used unnoticed",
        )


@rule(
    "PD112",
    "warning",
    fix="Set PDLAUNCH_API_KEY, or --host 127.0.0.1 behind a proxy that authenticates.",
    source="An open port answers whoever reaches it.",
    on_vllm=True,
)
def open_without_key(context: Context) -> Iterator[Found]:
    """The API listens beyond this machine without a key.

    Whoever reaches the port can use the engines, and read what the prefix cache tells by its
    timing.
    """
    config = context.config
    if config.api_key is None and not is_loopback(config.host):
        yield Found("host", f"the API listens on {config.host} and asks for no key")


@rule(
    "PD114",
    "warning",
    fix="Remove it.",
    source="How the KV cache is sized.",
    on_vllm=True,
)
def without_effect(context: Context) -> Iterator[Found]:
    """A setting has no effect on this set-up.

    A setting that is ignored gives a wrong idea of what runs.
    """
    for engine in context.engines.values():
        where = engine.where("gpu_memory_utilization")
        if not context.given(where):
            continue
        if engine.device == "cpu":
            yield Found(
                where,
                "gpu_memory_utilization does nothing on a CPU; kv_cache_memory sizes the KV cache",
            )
        elif engine.settings.kv_cache_memory is not None:
            yield Found(
                where,
                (
                    "gpu_memory_utilization does nothing beside kv_cache_memory, which sizes the "
                    "KV cache"
                ),
            )


@rule(
    "PD115",
    "warning",
    fix="Lower num_threads, or leave it out: the cores are then shared evenly.",
    source="Measured on 2 cores.",
    needs=("cpus",),
    on_vllm=True,
)
def too_many_threads(context: Context) -> Iterator[Found]:
    """The ranks use more CPU threads than there are cores.

    Threads that wait for a core spin: a step then takes many times as long.
    """
    # Shared evenly, threads are never more than cores, or one a rank, of which PD412 speaks.
    engines = [engine for engine in context.on("cpu") if engine.settings.num_threads is not None]
    threads = sum(engine.num_ranks * (engine.settings.num_threads or 0) for engine in engines)
    cores = len(context.machine.cpus)
    if (
        engines
        and threads > cores
        and any((engine.settings.num_threads or 0) > 1 for engine in engines)
    ):
        shares = " + ".join(
            f"{engine.num_ranks} {engine.role} ranks x {engine.settings.num_threads}"
            for engine in engines
        )
        yield Found(
            engines[0].where("num_threads"), f"{shares} = {threads} threads on {cores} cores"
        )


@rule(
    "PD117",
    "info",
    fix="Remove load_format.",
    source="load_format.",
    on_vllm=True,
)
def dummy_weights(context: Context) -> Iterator[Found]:
    """The weights are random.

    load_format: dummy is for benchmarks: the answers have no meaning.
    """
    for engine in context.engines.values():
        if engine.settings.load_format == "dummy":
            yield Found(
                engine.where("load_format"), "load_format is dummy: the answers have no meaning"
            )


@rule(
    "PD118",
    "error",
    fix="Set tensor_parallel_size to 1.",
    source="pdlaunch's tensor parallelism.",
    needs=("model",),
)
def tp_cuts_no_experts(context: Context) -> Iterator[Found]:
    """tensor_parallel_size is over 1 for a model with experts.

    Experts (MoE) are not cut: all of them belong to one rank.
    """
    for engine, shape in context.shapes():
        if shape.num_experts and engine.tp_size > 1:
            message = (
                f"tensor_parallel_size {engine.tp_size} for {shape.model_type}, which has "
                f"{shape.num_experts} experts a layer"
            )
            yield Found(engine.where("tensor_parallel_size"), message)


@rule(
    "PD119",
    "error",
    fix="Complete the download, or convert the weights to safetensors.",
    source="The format of safetensors; pickle's own documentation warns of untrusted files.",
    needs=("weights",),
    on_vllm=True,
)
def weights_unreadable(context: Context) -> Iterator[Found]:
    """The weights of the model are missing, damaged, or in a format that is not read.

    Engines read *.safetensors. A file that is cut off or missing would end every rank after its
    libraries are loaded. Pickles (*.bin, *.pt, *.pth) can run any code when they are opened, so
    they are never read.
    """
    for role, error in (context.probes.weight_errors or {}).items():
        if role in context.engines:
            yield Found(context.engines[role].where("model"), str(error), error.fix)
