"""For each rule on settings and pairs (PD1xx, PD3xx): where it fires, and near misses."""

from dataclasses import replace

from pdlaunch.errors import ConfigError
from tests.checks.contexts import CPU, GPU, SHAPE, SLIDING, SMALL_SHAPE, Case, on, p2p

A_KEY = {"name": "a", "sha256": "0" * 64}
OVER_FILES = {"kv_transfer__connector": "file", "kv_transfer__file__directory": "/kv"}

CASES: dict[str, Case] = {
    "PD101": Case(
        on(CPU, prefill__replicas=0, decode__replicas=0), quiet=[on(CPU, prefill__replicas=0)]
    ),
    "PD102": Case(
        on(CPU, prefill__replicas=0),
        on(CPU, decode__replicas=0),
        quiet=[on(CPU, prefill__replicas=0, decode__replicas=0)],
    ),
    "PD103": Case(
        on(CPU, model_error=ConfigError("no such model", fix="name one")), quiet=[on(CPU)]
    ),
    "PD104": Case(
        on(CPU, prefill__tensor_parallel_size=2),
        on(GPU, decode__tensor_parallel_size=64),
        quiet=[on(CPU, prefill__tensor_parallel_size=3)],
    ),
    "PD105": Case(
        on(CPU, decode__tensor_parallel_size=2),
        on(GPU, decode__tensor_parallel_size=12),
        quiet=[on(GPU, decode__tensor_parallel_size=16), on(CPU, decode__tensor_parallel_size=9)],
    ),
    "PD106": Case(
        on(CPU, max_model_len=8193),
        on(CPU, decode__max_model_len=9000),
        quiet=[on(CPU, max_model_len=8192)],
    ),
    "PD107": Case(
        on(CPU, kv_transfer__lease_s=20.0),
        on(CPU, kv_transfer__lease_s=20.0, engine="vllm"),
        quiet=[
            on(CPU, kv_transfer__lease_s=5.0, kv_transfer__pull_timeout_s=4.0),
            on(
                CPU,
                engine="vllm",
                kv_transfer={"connector": "vllm-nixl", "lease_s": 20, "pull_timeout_s": 30},
            ),
        ],
    ),
    "PD108": Case(on(GPU, block_size=24), quiet=[on(CPU, block_size=24), on(GPU, block_size=48)]),
    "PD111": Case(on(CPU, kv_transfer__verify="off"), quiet=[on(CPU, kv_transfer__verify="on")]),
    "PD112": Case(
        *(on(CPU, host=host) for host in ("0.0.0.0", "::", "::1:2")),
        *(on(CPU, host=f"{name}.example.org") for name in ("localhost", "127.0.0.1")),
        quiet=[
            on(CPU, host="localhost"),
            on(CPU, host="0.0.0.0", api_key="k"),
            on(CPU, host="0.0.0.0", api_keys=[A_KEY]),
            on(CPU, host="::1"),
        ],
    ),
    "PD113": Case(
        on(CPU, ssl_certfile="/nowhere/cert.pem"), on(CPU, ssl_certfile=__file__), quiet=[on(CPU)]
    ),
    "PD122": Case(
        on(CPU, autopilot="on", routing={"policy": "pairs"}),
        quiet=[
            on(CPU, autopilot="on", routing={"policy": "load"}),
            on(CPU, autopilot="dry-run", routing={"policy": "pairs"}),
        ],
    ),
    "PD117": Case(on(CPU, load_format="dummy"), quiet=[on(CPU, load_format="auto")]),
    "PD119": Case(
        on(CPU, probes={"weight_errors": {"decode": ConfigError("only pickles", fix="convert")}}),
        quiet=[
            on(
                CPU,
                prefill__replicas=0,
                probes={"weight_errors": {"prefill": ConfigError("only pickles")}},
            )
        ],
    ),
    "PD301": Case(
        on(GPU, shapes=(SHAPE, SMALL_SHAPE)),
        on(CPU, shapes=(SMALL_SHAPE, replace(SMALL_SHAPE, vocab_size=1))),
        on(CPU, shapes=(SMALL_SHAPE, SLIDING)),
        quiet=[
            on(CPU, shapes=(SLIDING, SLIDING)),
            on(CPU, shapes=(SMALL_SHAPE, replace(SMALL_SHAPE, eos_token_ids=(7,)))),
        ],
    ),
    "PD316": Case(
        on(CPU, prefill__replicas=1, both__replicas=1, shapes=(SHAPE, SMALL_SHAPE)),
        on(CPU, prefill__replicas=1, both__replicas=1, paths=("/models/a", "/models/b")),
        on(CPU, prefill__replicas=1, both__replicas=1, both__load_format="dummy"),
        quiet=[
            on(CPU, prefill__replicas=1, both__replicas=1),
            on(CPU, both__replicas=1, shapes=(SHAPE, SMALL_SHAPE)),
        ],
    ),
    "PD317": Case(
        on(CPU, decode__revision="main"),
        quiet=[on(CPU, revision="main"), on(CPU, decode__model="b", decode__revision="main")],
    ),
    "PD303": Case(
        on(CPU, prefill__dtype="float32"),
        on(GPU, decode__dtype="float16"),
        quiet=[on(GPU, decode__dtype="bfloat16"), on(CPU, dtype="float32")],
    ),
    "PD304": Case(
        on(CPU, decode__block_size=32),
        on(CPU, engine="vllm", decode__block_size=64),
        on(GPU, engine="vllm", block_size=64, decode__block_size=32),
        quiet=[
            on(CPU, block_size=32, decode__block_size=32),
            on(GPU, engine="vllm", block_size=32, decode__block_size=64),
            on(CPU, engine="vllm", block_size=64),
        ],
    ),
    "PD309": Case(
        on(CPU, decode__max_model_len=4096), quiet=[on(CPU, prefill__max_model_len=4096)]
    ),
    "PD314": Case(
        p2p(GPU, prefill__device="cpu"),
        on(GPU, decode__device="cpu"),
        quiet=[
            p2p(GPU),
            p2p(CPU),
            p2p(GPU, device="cpu"),
            on(GPU, decode__device="cpu", **OVER_FILES),
        ],
    ),
}
