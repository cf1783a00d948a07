"""For each rule on the configuration (PD1xx): a file or flags that fire it, and its fixes."""

from dataclasses import replace

from tests.checks.contexts import CPU, GIB, GPU
from tests.checks.firing import Case, Setup

PLAIN = Setup()
ON_THIS_MACHINE = Setup(machine=None)
TWO_CORES = replace(CPU, cpus=(0, 1), has_native_bf16=False, memory_bytes=256 * GIB)

CASES = [
    Case(
        "PD101",
        Setup("prefill: {replicas: 0}\ndecode: {replicas: 0}\n"),
        {
            "Set prefill.replicas and decode.replicas": PLAIN,
            "or both.replicas, to 1 or more": Setup("both: {replicas: 1}\n"),
        },
    ),
    Case(
        "PD102",
        Setup(flags=("--decode", "0")),
        {
            "Give both roles at least one engine": Setup(flags=("--decode", "1")),
            "or neither, and `both` some": Setup(flags=("--both", "1")),
        },
    ),
    Case(
        "PD103",
        Setup(model="no-such-folder", machine=None),
        {
            "a directory in Hugging Face layout": ON_THIS_MACHINE,
            "a .gguf file of a supported family": Setup(model="tiny.gguf", machine=None),
        },
    ),
    Case(
        "PD104",
        Setup(flags=("--decode-tp", "3")),
        {"Choose a tensor_parallel_size that divides both": Setup(flags=("--decode-tp", "2"))},
    ),
    Case(
        "PD105",
        Setup(model="tiny-12-heads", flags=("--decode-tp", "6")),
        {
            "divides the number of KV heads": Setup(
                model="tiny-12-heads", flags=("--decode-tp", "4")
            ),
            "or a multiple of it": Setup(model="tiny-12-heads", flags=("--decode-tp", "12")),
        },
    ),
    Case(
        "PD106",
        Setup("max_model_len: 513\n"),
        {"Lower max_model_len": Setup("max_model_len: 512\n"), "leave it out": PLAIN},
    ),
    Case(
        "PD107",
        Setup("kv_transfer: {lease_s: 10}\n"),
        {
            "Make kv_transfer.lease_s longer than kv_transfer.pull_timeout_s": Setup(
                "kv_transfer: {lease_s: 10, pull_timeout_s: 9}\n"
            )
        },
    ),
    Case(
        "PD108",
        Setup("block_size: 24\n", machine=GPU),
        {
            "Use a multiple of 16": Setup("block_size: 32\n", machine=GPU),
            "64 or 128": Setup("block_size: 64\n", machine=GPU),
        },
    ),
    Case(
        "PD109",
        Setup("block_size: 512\nmax_model_len: 500\n"),
        {"Lower block_size": Setup("block_size: 250\nmax_model_len: 500\n")},
    ),
    Case(
        "PD110",
        Setup("max_num_batched_tokens: 32\n"),
        {
            "Raise max_num_batched_tokens": Setup("max_num_batched_tokens: 64\n"),
            "lower max_num_seqs": Setup("max_num_batched_tokens: 32\nmax_num_seqs: 32\n"),
        },
    ),
    Case(
        "PD111",
        Setup("kv_transfer: {verify: off}\n"),
        {"Remove kv_transfer.verify: off": PLAIN},
    ),
    Case(
        "PD112",
        Setup(flags=("--host", "0.0.0.0")),
        {
            "Set PDLAUNCH_API_KEY": Setup(
                flags=("--host", "0.0.0.0"), environ={"PDLAUNCH_API_KEY": "k"}
            ),
            "--host 127.0.0.1": Setup(flags=("--host", "127.0.0.1")),
        },
    ),
    Case(
        "PD113",
        Setup("limits: {request_timeout_s: 20}\n"),
        {
            "Raise limits.request_timeout_s": Setup("limits: {request_timeout_s: 21}\n"),
            "lower kv_transfer.pull_timeout_s": Setup(
                "limits: {request_timeout_s: 20}\nkv_transfer: {pull_timeout_s: 19}\n"
            ),
        },
    ),
    Case("PD114", Setup("gpu_memory_utilization: 0.5\n"), {"Remove it": PLAIN}),
    Case(
        "PD114",
        Setup("gpu_memory_utilization: 0.5\nkv_cache_memory: 1GiB\n", machine=GPU),
        {"Remove it": Setup("kv_cache_memory: 1GiB\n", machine=GPU)},
    ),
    Case(
        "PD115",
        Setup("num_threads: 9\n"),
        {"Lower num_threads": Setup("num_threads: 8\n"), "leave it out": PLAIN},
    ),
    Case(
        "PD116",
        Setup(flags=("--startup-timeout", "20")),
        {
            "Make startup_timeout_s longer than kv_transfer.handshake_timeout_s": Setup(
                flags=("--startup-timeout", "21")
            )
        },
    ),
    Case("PD117", Setup("load_format: dummy\n"), {"Remove load_format": PLAIN}),
    Case(
        "PD118",
        Setup("decode: {tensor_parallel_size: 2}\n", model="gpt-oss", machine=GPU),
        {
            "Set tensor_parallel_size to 1": Setup(
                "decode: {tensor_parallel_size: 1}\n",
                model="gpt-oss",
                machine=replace(
                    GPU, gpus=tuple(replace(gpu, memory_bytes=1 << 40) for gpu in GPU.gpus)
                ),
            )
        },
    ),
    Case(
        "PD119",
        Setup(model="no-weights", machine=None),
        {"Complete the download": ON_THIS_MACHINE},
    ),
    Case(
        "PD119",
        Setup(model="pickles", machine=None),
        {"convert the weights to safetensors": ON_THIS_MACHINE},
    ),
    Case(
        "PD120",
        Setup(model="llama-8b", machine=TWO_CORES),
        {
            "Raise hang_timeout_s": Setup(
                "hang_timeout_s: 600\n", model="llama-8b", machine=TWO_CORES
            ),
            "0 for never": Setup("hang_timeout_s: 0\n", model="llama-8b", machine=TWO_CORES),
            "lower max_num_batched_tokens": Setup(
                "max_num_batched_tokens: 128\n", model="llama-8b", machine=TWO_CORES
            ),
        },
    ),
    Case(
        "PD121",
        Setup(environ={"VLLM_API_KEY": "k"}),
        {"api_key for VLLM_API_KEY": Setup(environ={"PDLAUNCH_API_KEY": "k"})},
    ),
    Case(
        "PD121",
        Setup("decode: {env: {VLLM_CPU_KVCACHE_SPACE: '4'}}\n"),
        {
            "kv_cache_memory for VLLM_CPU_KVCACHE_SPACE": Setup(
                "decode: {env: {VLLM_CPU_KVCACHE_SPACE: '4'}, kv_cache_memory: 4GiB}\n"
            )
        },
    ),
    Case("PD122", Setup(environ={"VLLM_USE_V1": "1"}), {"Unset them": PLAIN}),
    Case(
        "PD123",
        Setup("max_num_seqs: 512\ndecode: {replicas: 3}\n"),
        {
            "Raise limits.max_queued_requests": Setup(
                "max_num_seqs: 512\ndecode: {replicas: 3}\nlimits: {max_queued_requests: 1536}\n",
            ),
            "lower max_num_seqs": Setup("max_num_seqs: 256\ndecode: {replicas: 3}\n"),
        },
    ),
]
