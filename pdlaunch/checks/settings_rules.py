"""Rules PD1xx find settings that contradict each other or the model."""

from collections.abc import Iterator

from pdlaunch.checks.rule import Context, Found, error, info, warning
from pdlaunch.config.http_names import is_loopback
from pdlaunch.config.model_files.shape import ModelShape
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import PAIR
from pdlaunch.config.shared_settings import ONE_ENGINE_POLICIES
from pdlaunch.errors import ConfigError
from pdlaunch.protocol.certificates import CertificateFiles

CUDA_BLOCK_STEP_TOKENS = 16


def _lone_role(context: Context) -> Iterator[Found]:
    for present, absent in (PAIR, reversed(PAIR)):
        if present in context.engines and absent not in context.engines:
            count = context.engines[present].replicas
            engines = f"{count} {present} engine{'' if count == 1 else 's'}"
            yield Found(f"{engines}, but no {absent} engine", f"{absent}.replicas")


def _uneven_heads(context: Context) -> Iterator[Found]:
    for each, shape in context.shapes():
        numbers = {"attention heads": shape.num_attention_heads}
        # An outline's intermediate_size may not be that of its experts, and vLLM pads.
        if not shape.is_outline:
            numbers["intermediate_size"] = shape.intermediate_size
        for name, number in numbers.items():
            if number % each.tp_size:
                what = f"tensor_parallel_size {each.tp_size} does not divide the model's "
                yield Found(f"{what}{number} {name}", each.where("tensor_parallel_size"))


def _fitting_heads(shape: ModelShape) -> str:
    heads = shape.num_kv_heads
    sizes = [n for n in range(1, heads + 1) if not heads % n and not shape.num_attention_heads % n]
    return f"choose {', '.join(map(str, sizes))} or a multiple of {heads}"


def _certificate_problem(config: LaunchConfig) -> str:
    try:
        if files := CertificateFiles.given(config.ssl_certfile, config.ssl_keyfile):
            files.context()
    except ConfigError as error:
        return str(error)
    return ""


# fmt: off
RULES = (
    error("PD101", "The launch has no engine.",
        "Nothing can answer a request.",
        when=lambda context: not context.engines, at="prefill.replicas",
        message="no engine: prefill.replicas, decode.replicas and both.replicas are all 0",
        fix="Set prefill.replicas and decode.replicas, or both.replicas, to 1 or more.",
        source="The plan of a launch."),
    error("PD102", "There are prefill engines without decode engines, or the other way round.",
        "No KV blocks are transferred, and one role does the work of both.",
        when=_lone_role,
        fix="Give both roles an engine; or set both.replicas, and give neither an engine.",
        source="The plan of a launch."),
    error("PD103", "The model cannot be found or cannot be served.",
        "Every engine would fail while it loads the model.",
        over=Context.roles,
        when=lambda each: (wrong := each.model.error) is not None
        and Found(str(wrong), fix=wrong.fix), at="model",
        fix="Name an alias, a directory in Hugging Face layout, or a .gguf file of a supported "
        "family.", source="The model's own config.json.", needs=("model_files",)),
    error("PD104", "tensor_parallel_size does not divide the attention heads of the model.",
        "Tensor parallelism gives every rank the same number of attention heads, and an equal "
        "part of the inner size.",
        when=_uneven_heads,
        fix="Choose a tensor_parallel_size that divides both numbers.",
        source="Megatron-style tensor parallelism.", needs=("model",)),
    error("PD105", "tensor_parallel_size does not fit the KV heads of the model.",
        "A rank holds whole KV heads. Either every rank holds the same number of heads, or every "
        "head is replicated on the same number of ranks.",
        over=Context.shapes,
        when=lambda it: it[1].num_kv_heads % it[0].tp_size and it[0].tp_size % it[1].num_kv_heads
        and Found(fix=_fitting_heads(it[1])), at="tensor_parallel_size",
        message="tensor_parallel_size {0.tp_size} does not fit the model's {1.num_kv_heads} KV "
        "heads",
        fix="Choose a tensor_parallel_size that divides the number of KV heads, or a multiple of "
        "it.", source="pdlaunch's KV layout: heads first, one region a head.", needs=("model",)),
    error("PD106", "max_model_len is larger than the model supports.",
        "The model was not trained on positions beyond max_position_embeddings.",
        over=Context.shapes,
        when=lambda it: (it[0].settings.max_model_len or 0) > it[1].max_position_embeddings
        and not (it[1].is_outline or it[0].has_argument("hf-overrides"))
        and Found(fix=f"set it to {it[1].max_position_embeddings} or less, or leave it out"),
        at="max_model_len",
        message="max_model_len {0.settings.max_model_len} exceeds the model's "
        "{1.max_position_embeddings} positions",
        fix="Lower max_model_len, or leave it out.",
        source="max_position_embeddings of the model's config.json.", needs=("model",)),
    error("PD107", "The lease on prefill's blocks is shorter than the longest transfer.",
        "When a lease ends, prefill gives the blocks to other requests. A pull that has not timed "
        "out yet then reads wrong bytes, and the prompt is computed again.",
        over=lambda context: [context.kv_transfer] if context.pair else [],
        # vLLM's own connector has no time-out of pulls.
        when=lambda it: not it.is_stock and it.lease_s <= it.pull_timeout_s
        and Found(fix=f"raise lease_s above {it.pull_timeout_s:g}, or lower pull_timeout_s"),
        at="kv_transfer.lease_s",
        message="blocks are leased for {0.lease_s:g} s, but a pull may take {0.pull_timeout_s:g} s",
        fix="Make kv_transfer.lease_s longer than kv_transfer.pull_timeout_s.",
        source="vLLM: after its lease the late read succeeds, and decode answers wrong text with "
        "HTTP 200 (measured)."),
    error("PD108", "block_size is not allowed by the attention backend of the device.",
        "Paged attention kernels on CUDA read the KV cache in tiles of 16 tokens.",
        over=Context.on_cuda,
        when=lambda each: each.settings.block_size % CUDA_BLOCK_STEP_TOKENS
        and Found(fix=f"set it to {max(1, round(each.settings.block_size / 16)) * 16}"),
        at="block_size",
        message="block_size {0.settings.block_size} is not a multiple of 16, as CUDA needs",
        fix="Use a multiple of 16; blocks of 64 or 128 tokens are transferred faster.",
        source="The paged variants of FlashAttention.", needs=("gpus",)),
    warning("PD111", "Pulled KV blocks are not verified.",
        "Without checksums, decode may use a block that was overwritten during the READ, and the "
        "answer is wrong with HTTP 200.",
        when=lambda context: context.pair and not context.kv_transfer.verify,
        at="kv_transfer.verify",
        message="kv_transfer.verify is off: wrong KV blocks would go unnoticed",
        fix="Remove kv_transfer.verify: off; it is meant for measurements.",
        source="NIXL 1.5.1: a READ of deregistered memory ends as DONE (measured)."),
    warning("PD112", "The API listens beyond this machine without a key.",
        "Anyone who can reach the port can use the engines, and can learn from the timing of the "
        "prefix cache what others have asked.",
        over=lambda context: [context.config],
        when=lambda config: config.api_key is None and not config.api_keys
        and not is_loopback(config.host), at="host",
        message="the API listens on {0.host} and asks for no key",
        fix="Set PDLAUNCH_API_KEY, or --host 127.0.0.1 behind a proxy that authenticates.",
        source="An open port answers everyone."),
    error("PD113", "The router's certificate cannot be used.",
        "The router would fail to start.",
        over=lambda context: [context.config], when=_certificate_problem, at="ssl_certfile",
        fix="Name PEM files: the chain, and its private key without a password.",
        source="ssl.SSLContext.load_cert_chain.", needs=("ports",)),
    error("PD122", "The autopilot is on, but decode engines never serve a request alone.",
        "With such a routing policy the autopilot changes roles whenever the load changes, and an "
        "engine does not serve during each change. Loads that changed every minute or two were "
        "served worse than without it. With routing: load, decode engines help with prompts.",
        over=lambda context: [context.config],
        when=lambda config: config.autopilot == "on"
        and config.routing.policy not in ONE_ENGINE_POLICIES,
        at="autopilot", message="autopilot is on with routing: {0.routing.policy}",
        fix=f"Set routing: {' or '.join(ONE_ENGINE_POLICIES)}; or set autopilot: dry-run to see "
        "what the autopilot would do.", source="benchmarks/autopilot.py (simulated)."),
    info("PD117", "The weights are random.",
        "load_format: dummy is for benchmarks.",
        over=Context.roles, when=lambda each: each.settings.load_format == "dummy",
        at="load_format", message="load_format is dummy: the answers are meaningless",
        fix="Remove load_format.", source="load_format."),
    error("PD119", "Files of the model are missing, damaged, or do not fit its config.json.",
        "Engines read *.safetensors. With a truncated or missing file, every rank would fail after "
        "it has loaded its libraries. Pickles (*.bin, *.pt, *.pth) can run any code when they are "
        "opened, so engines never read them.",
        over=lambda context: [
            (context.engines[role], wrong)
            for role, wrong in (context.probes.weight_errors or {}).items()
            if role in context.engines
        ], when=lambda it: Found(str(it[1]), fix=it[1].fix), at="model",
        fix="Complete the download, or convert the weights to safetensors.",
        source="The format of safetensors; pickle's own documentation warns of untrusted files.",
        needs=("weights",)),
)
# fmt: on
