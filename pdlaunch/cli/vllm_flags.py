"""Says what to do instead of a flag of ``vllm serve`` that pdlaunch does not have.

Flags of the same name and meaning need no entry. Source: the flags of vLLM 0.32
(``vllm/engine/arg_utils.py``, ``vllm/entrypoints/launchers/cli_args.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

from pdlaunch.config.settings import all_flags, all_settings, flag_name, variable_name

_BOTH_ROLES = "use --tensor-parallel-size, or --prefill-tp and --decode-tp"
_MANY_ENGINES = "--prefill N and --decode N start several engines behind one router"
_OWN_FILES = "the files of the model itself are used"
_FOR_VLLM = "with engine: vllm it goes into engine_args of the file"
_UNQUANTIZED = f"weights are served unquantized, a .gguf file too; {_FOR_VLLM}"
_FROM_SCRATCH = "pdlaunch wires prefill and decode itself"

INSTEAD: Mapping[str, str] = {
    "-tp": _BOTH_ROLES,
    "--tp": _BOTH_ROLES,
    "-dp": _MANY_ENGINES,
    "--data-parallel-size": _MANY_ENGINES,
    "--kv-cache-memory-bytes": "use --kv-cache-memory",
    "--num-gpu-blocks-override": "use --kv-cache-memory",
    "--kv-offloading-size": "use --kv-offload-memory, for each rank",
    "--kv-transfer-config": (
        f"{_FROM_SCRATCH}; --kv-connector chooses the connector, the section kv_transfer of the "
        "file has its settings"
    ),
    "--shutdown-timeout": "use --drain-timeout",
    "--allowed-origins": "use --cors-origins",
    "--max-num-queued-reqs": "set limits.max_queued_requests in the file",
    "--config": "give the YAML file as the argument: pdlaunch serve FILE.yaml",
    "--download-dir": "set the variable HF_HOME",
    "--hf-token": "set the variable HF_TOKEN",
    "--device-ids": "set the variable CUDA_VISIBLE_DEVICES",
    "--seed": "send `seed` with a request",
    "--cudagraph-capture-sizes": "use --max-cudagraph-capture-size; sizes up to it are chosen",
    "--enable-chunked-prefill": "long prompts are always computed in parts; "
    "--max-num-batched-tokens sets how much one step takes",
    "--disable-log-requests": "requests are not logged; use --log-level",
    "--uvicorn-log-level": "use --log-level",
    "--tokenizer": _OWN_FILES,
    "--tokenizer-revision": _OWN_FILES,
    "--hf-config-path": _OWN_FILES,
    "--chat-template": _OWN_FILES,
    "--trust-remote-code": f"code that comes with a model is never run; {_FOR_VLLM}",
    "--quantization": _UNQUANTIZED,
    "-q": _UNQUANTIZED,
    "--ssl-keyfile": "a proxy in front of the router has to end TLS",
    "--ssl-certfile": "a proxy in front of the router has to end TLS",
}
"""Flags of vLLM that have another name here, with the way to the same end."""

_MISSING = """
    --additional-config --aggregate-engine-logging --all2all-backend --allow-credentials
    --allow-deprecated-quantization --allowed-headers --allowed-local-media-path
    --allowed-media-domains --allowed-methods --api-server-count --attention-backend
    --attention-config --chat-template-content-format --code-revision --collect-detailed-traces
    --compilation-config --config-format --convert --cp-kv-cache-interleave-size --cpu-offload-gb
    --cpu-offload-params --cudagraph-metrics --data-parallel-address
    --data-parallel-backend --data-parallel-external-lb --data-parallel-hybrid-lb
    --data-parallel-rank --data-parallel-rpc-port --data-parallel-size-local
    --data-parallel-start-rank --decode-context-parallel-size --default-chat-template-kwargs
    --default-mm-loras --diffusion-config --disable-cascade-attn --disable-chunked-mm-input
    --disable-custom-all-reduce --disable-fastapi-docs --disable-hybrid-kv-cache-manager
    --disable-log-stats --disable-sliding-window --disable-uvicorn-access-log
    --distributed-executor-backend --distributed-timeout-seconds --ec-transfer-config
    --enable-auto-tool-choice --enable-dbo --enable-elastic-ep --enable-eplb
    --enable-expert-parallel --enable-force-include-usage --enable-layerwise-nvtx-tracing
    --enable-log-outputs --enable-log-requests --enable-lora --enable-mfu-metrics
    --enable-mm-embeds --enable-prompt-embeds --enable-prompt-tokens-details
    --enable-request-id-headers --enable-return-routed-experts --enable-server-load-tracking
    --enable-ssl-refresh --enable-tokenizer-info-endpoint --enable-tower-connector-lora
    --eplb-config --exclude-tools-when-tool-choice-none --expert-placement-strategy
    --fully-sharded-loras --grpc --headless --hf-overrides --ignore-patterns
    --io-processor-plugin --kernel-config --kv-cache-dtype --kv-cache-metrics --kv-events-config
    --kv-offloading-backend --kv-sharing-fast-prefill --language-model-only --limit-mm-per-prompt
    --log-config-file --log-error-stack --logits-processors --logprobs-mode
    --long-prefill-token-threshold --lora-dtype --lora-modules --mamba-block-size
    --mamba-cache-dtype --mamba-cache-mode --mamba-ssm-cache-dtype --master-addr --master-port
    --max-cpu-loras --max-log-len --max-logprobs --max-lora-rank
    --max-loras --max-parallel-loading-workers --media-io-kwargs --middleware
    --mm-encoder-attn-backend --mm-encoder-only --mm-encoder-tp-mode --mm-processor-cache-gb
    --mm-processor-cache-type --mm-processor-kwargs --model-impl --model-loader-extra-config
    --moe-backend --nnodes --node-rank --numa-bind --offload-backend --optimization-level
    --otlp-traces-endpoint --override-generation-config --performance-mode
    --pipeline-parallel-size --pooler-config --prefill-context-parallel-size
    --prefix-caching-hash-algo --profiler-config --quantization-config --ray-workers-use-nsight
    --reasoning-config --reasoning-parser --reasoning-parser-plugin --renderer-num-workers
    --response-role --return-tokens-as-token-ids --root-path --runner
    --safetensors-load-strategy --scheduler-cls --scheduling-policy
    --show-hidden-metrics-for-version --skip-mm-profiling --skip-tokenizer-init --spec-method
    --spec-model --spec-tokens --speculative-config --ssl-ca-certs --ssl-cert-reqs --ssl-ciphers
    --stream-interval --structured-outputs-config --swap-space --tokenizer-mode --tokens-only
    --tool-call-parser --tool-parser-plugin --tool-server --trust-request-chat-template
    --ubatch-size --uds --weight-transfer-config --worker-cls --worker-extension-cls
    -ac -cc -dc -dcp -dpa -dpb -dph -dpl -dpn -dpp -dpr -ep -n -pcp -pp -r -sc
"""
MISSING = frozenset(_MISSING.split())
"""Further flags of vLLM, for which there is nothing here."""


def advice(name: str) -> str | None:
    """Say what to do instead of vLLM's flag ``name``; None for a name that vLLM does not know."""
    if name.startswith("--no-"):
        name = f"--{name.removeprefix('--no-')}"
    if name in INSTEAD:
        return INSTEAD[name]
    path = name.removeprefix("--").replace("-", "_")
    if path in all_flags():
        return f"did you mean {flag_name(path)}?"
    if path in all_settings():
        return f"set {path} in the file, or the variable {variable_name(path)}"
    return f"pdlaunch's own engines have nothing like it; {_FOR_VLLM}" if name in MISSING else None
