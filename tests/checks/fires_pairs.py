"""For each rule on pairs (PD3xx): a file or flags that fire it, and its fixes."""

from tests.checks.contexts import GPU
from tests.checks.firing import Case, Setup

OVER_FILES = "kv_transfer: {connector: file, file: {directory: files}}\n"

CASES = [
    Case(
        "PD301",
        Setup("decode: {model: tiny-deep}\n"),
        {"Set model once, at the top level": Setup(model="tiny-deep")},
    ),
    Case(
        "PD302",
        Setup("decode: {model: tiny-copy}\n"),
        {"Set model once, at the top level": Setup(model="tiny-copy")},
    ),
    Case(
        "PD315",
        Setup("decode: {model: tiny-warm}\n"),
        {
            "Give both models the same generation_config.json": Setup(model="tiny-warm"),
            "generation_config: vllm": Setup(
                "decode: {model: tiny-warm}\ngeneration_config: vllm\n"
            ),
        },
    ),
    Case(
        "PD316",
        Setup("prefill: {replicas: 1}\nboth: {replicas: 1, model: tiny-deep}\n"),
        {
            "Set model and load_format once, at the top level": Setup(
                "prefill: {replicas: 1}\nboth: {replicas: 1}\nload_format: dummy\n",
                model="tiny-deep",
            )
        },
    ),
    Case(
        "PD303",
        Setup("decode: {dtype: bfloat16}\n"),
        {"Set dtype once, at the top level": Setup("dtype: bfloat16\n")},
    ),
    Case(
        "PD304",
        Setup("decode: {block_size: 32}\n"),
        {"Set block_size once, at the top level": Setup("block_size: 32\n")},
    ),
    Case(
        "PD305",
        Setup("decode: {model: qwen-sliding}\n", model="qwen"),
        {"Serve the same model on both sides": Setup(model="qwen-sliding")},
    ),
    Case(
        "PD306",
        Setup("decode: {model: tiny-4-kv-heads}\n"),
        {"Serve the same model on both sides": Setup(model="tiny-4-kv-heads")},
    ),
    Case(
        "PD307",
        Setup(model="tiny-12-heads", flags=("--prefill-tp", "2", "--decode-tp", "3")),
        {
            "Choose sizes of which one divides the other": Setup(
                model="tiny-12-heads", flags=("--prefill-tp", "2", "--decode-tp", "4")
            )
        },
    ),
    Case(
        "PD308",
        Setup(flags=("--prefill-tp", "2")),
        {
            "Give decode at least as many ranks an engine as prefill": Setup(
                flags=("--prefill-tp", "2", "--decode-tp", "2")
            )
        },
    ),
    Case(
        "PD309",
        Setup("decode: {max_model_len: 256}\n"),
        {"Set max_model_len once, at the top level": Setup("max_model_len: 256\n")},
    ),
    Case(
        "PD310",
        Setup("decode: {load_format: dummy}\n"),
        {"Set load_format once, at the top level": Setup("load_format: dummy\n")},
    ),
    Case(
        "PD311",
        Setup(f"decode: {{device: cpu}}\n{OVER_FILES}", machine=GPU),
        {"Set device once, at the top level": Setup(f"device: cpu\n{OVER_FILES}", machine=GPU)},
    ),
    *(
        Case(
            "PD314",
            Setup(f"decode: {{device: cpu}}\n{path}", machine=GPU),
            {
                "Set device once, at the top level": Setup(f"device: cpu\n{path}", machine=GPU),
                "set kv_transfer.connector to file": Setup(
                    f"decode: {{device: cpu}}\n{OVER_FILES}", machine=GPU
                ),
            },
        )
        for path in (
            "",
            *(f"kv_transfer: {{nixl: {{path: {name}}}}}\n" for name in ("nixl", "p2p")),
        )
    ),
    Case(
        "PD313",
        Setup(
            "decode: {enable_cumem_allocator: true}\nkv_transfer: {nixl: {path: nixl}}\n",
            machine=GPU,
        ),
        {
            "Set enable_cumem_allocator and enable_sleep_mode once, at the top level": Setup(
                "enable_cumem_allocator: true\n", machine=GPU
            ),
            "let kv_transfer.nixl.path be auto": Setup(
                "decode: {enable_cumem_allocator: true}\n", machine=GPU
            ),
        },
    ),
]
