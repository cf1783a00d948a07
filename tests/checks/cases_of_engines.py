"""For each rule on engines of vLLM (PD6xx): where it fires, and near misses."""

from dataclasses import replace
from typing import Any

from pdlaunch.checks.probed import SeenDeployment, SeenEngine, SeenPair
from pdlaunch.checks.rule import Context
from pdlaunch.machine.host import EngineCommand
from tests.checks.contexts import CPU, GPU, SHAPE, Case, on

LATENT = {"shapes": (replace(SHAPE, is_latent=True, num_kv_heads=1),) * 2}
STOCK = {"kv_transfer__connector": "vllm-nixl"}
DS = {"VLLM_SSM_CONV_STATE_LAYOUT": "DS"}
FOUND = EngineCommand(version="0.32.0")
OLDER = EngineCommand(version="0.31.1")
NEW = EngineCommand(version="0.33.0")
OLDEST = EngineCommand(version="0.24.0")
TIER: dict[str, Any] = {"engine_args": {"kv_offloading_size": 4}}
CACHED_STATES: dict[str, Any] = {"has_state": True, "enable_prefix_caching": True, **STOCK}
ALIKE = {
    "version": "0.32.0",
    "models": ("a",),
    "max_model_len": 4096,
    "block_size": "32",
    "cache_dtype": "auto",
}


def vllm(machine=CPU, /, **config: Any) -> Context:
    return on(machine, engine="vllm", **config)


def args(**arguments: Any) -> Context:
    return vllm(engine_args={name.replace("__", "."): value for name, value in arguments.items()})


def differing(**decode: Any) -> Context:
    """Prefill has seed alone; decode has what is given, too."""
    return vllm(engine_args={"seed": 1}, decode__engine_args=decode)


def told(
    prefill: EngineCommand, decode: EngineCommand = FOUND, machine=CPU, /, **config: Any
) -> Context:
    return vllm(
        machine,
        probes={"engine_commands": {"prefill": {"host": prefill}, "decode": {"host": decode}}},
        **config,
    )


def seen(*pairs: SeenPair, prefill: dict[str, Any] | None = None, **decode: Any) -> Context:
    """One engine of each role that runs already."""
    engines = (
        SeenEngine("prefill", "http://p", **(ALIKE | (prefill or {}))),
        SeenEngine("decode", "http://d", **(ALIKE | decode)),
    )
    return vllm(probes={"deployment": SeenDeployment(engines, pairs)})


def seen_pair(**fields: Any) -> Context:
    return seen(SeenPair("http://p", "http://d", "p -> d", **fields))


CASES: dict[str, Case] = {
    "PD650": Case(seen(problem="it does not answer"), quiet=[seen()]),
    "PD651": Case(seen(version="0.31.1"), quiet=[seen(), seen(version=None)]),
    "PD652": Case(
        seen(models=("b",)),
        seen(max_model_len=100),
        quiet=[seen(), seen(prefill={"max_model_len": 100})],
    ),
    "PD653": Case(seen(block_size="16"), seen(cache_dtype="fp8"), quiet=[seen(cache_dtype=None)]),
    "PD654": Case(seen_pair(problem="no byte"), quiet=[seen_pair(num_bytes=1), seen()]),
    "PD655": Case(seen(prompt_tokens=9), quiet=[seen(prompt_tokens=9, bytes_read=1), seen()]),
    "PD656": Case(seen(prefill={"num_expired": 1}), quiet=[seen()]),
    "PD657": Case(seen(num_failed=1), quiet=[seen()]),
    "PD658": Case(seen(has_dev_mode=True), quiet=[seen()]),
    "PD660": Case(seen(), quiet=[vllm()]),
    "PD661": Case(
        seen_pair(wrong_address="it sends decode to 0.0.0.0"),
        seen_pair(wrong_address="x"),
        quiet=[seen_pair(), seen()],
    ),
    "PD663": Case(
        seen(gigabytes_per_s=0.44),
        quiet=[
            *(seen(gigabytes_per_s=1.2), seen()),
            seen(gigabytes_per_s=0.4, label="decode-0", prefill={"kind": "native"}, kind="native"),
        ],
    ),
    "PD664": Case(
        seen(prefill={"num_answers": 10, "answer_tokens": 41}),
        quiet=[
            seen(prefill={"num_answers": 9, "answer_tokens": 900}),
            seen(prefill={"num_answers": 10, "answer_tokens": 40}),
            seen(num_answers=10, answer_tokens=900),
        ],
    ),
    "PD601": Case(
        args(pp=2),
        args(max_model_len=9),
        args(no_enforce_eager=True),
        args(dtype=False),
        quiet=[
            on(CPU, engine="native", engine_args={"tp": 2}),
            args(max_num_active_seqs=9),
            args(tokenizer="x"),
        ],
    ),
    "PD602": Case(
        args(pcp=2),
        args(ssl_keyf="k"),
        args(headless=True),
        quiet=[args(enable_expert_parallel=True), args(enable_lora=True), args(headless=False)],
    ),
    "PD605": Case(
        args(kv_events_config={"replay_endpoint": "tcp://127.0.0.1:1"}),
        args(kv_events_config__enable_kv_cache_events=True),
        quiet=[
            args(kv_events_config={"enable_kv_cache_events": True}),
            args(kv_events_config={"endpoint": "ipc:///run/e"}),
        ],
    ),
    "PD610": Case(on(CPU, decode__engine="vllm"), quiet=[vllm(), vllm(decode__replicas=0)]),
    "PD611": Case(told(EngineCommand(problem="it is a folder")), quiet=[told(FOUND)]),
    "PD612": Case(
        told(OLDER), quiet=[told(FOUND), told(EngineCommand()), told(OLDER, decode__replicas=0)]
    ),
    "PD613": Case(
        told(EngineCommand(version="0.23.1")),
        quiet=[told(EngineCommand(version="0.24.0")), told(EngineCommand(version="0.9"), **STOCK)],
    ),
    "PD614": Case(on(CPU, **STOCK), quiet=[vllm(**STOCK), on(CPU)]),
    "PD615": Case(
        vllm(generation_config="vllm"),
        on(CPU, engine="native", engine_command="vllm"),
        quiet=[vllm(kv_cache_memory="2GiB"), on(CPU)],
    ),
    "PD617": Case(
        told(EngineCommand(version="0.34.0")), quiet=[told(EngineCommand(version="0.33.1"))]
    ),
    "PD621": Case(
        told(NEW, NEW, **TIER, **STOCK),
        args(kv_offloading_size="much"),
        args(kv_offloading_b="lmcache"),
        quiet=[args(kv_offloading_size=4, kv_offloading_b="native"), on(CPU, **TIER)],
    ),
    "PD638": Case(
        told(NEW, EngineCommand(), **TIER),
        told(NEW, FOUND, **TIER),
        quiet=[
            told(NEW, NEW, **TIER),
            told(FOUND, FOUND, **TIER, **STOCK),
            told(FOUND, FOUND, **TIER, decode__replicas=0),
        ],
    ),
    "PD623": Case(
        told(NEW, EngineCommand(), GPU, enable_cumem_allocator=True),
        told(FOUND, FOUND, GPU, decode__enable_sleep_mode=True),
        quiet=[
            told(NEW, EngineCommand(), GPU, enable_cumem_allocator=True, **STOCK),
            vllm(GPU, enable_cumem_allocator=True),
            told(FOUND, FOUND, GPU, enable_cumem_allocator=True),
            told(NEW, NEW, GPU, enable_sleep_mode=True),
        ],
    ),
    "PD624": Case(
        args(dcp=2),
        args(speculative_config__method="ngram"),
        quiet=[vllm(engine_args={"dcp": 2}, **STOCK), args(enable_lora=True)],
    ),
    "PD629": Case(vllm(**STOCK), quiet=[vllm(), vllm(decode__replicas=0, **STOCK)]),
    "PD618": Case(
        vllm(GPU, enable_sleep_mode=True, decode__port=8200, engine_api_key="k"),
        quiet=[vllm(GPU, decode__port=8200, engine_api_key="k"), vllm(GPU, enable_sleep_mode=True)],
    ),
    "PD619": Case(
        vllm(kv_transfer__lease_s=7.9, **STOCK),
        quiet=[vllm(kv_transfer__lease_s=8, **STOCK), vllm(kv_transfer__lease_s=7.9)],
    ),
    "PD630": Case(
        vllm(env={"VLLM_NIXL_SIDE_CHANNEL_HOST": "0.0.0.0"}),
        vllm(decode__env={"VLLM_SERVER_DEV_MODE": "1"}),
        vllm(env={"VLLM_NIXL_SIDE_CHANNEL_PORT": "5600"}),
        vllm(env={"VLLM_HOST_IP": "10.0.0.1"}, nnodes=2),
        quiet=[
            vllm(environ={"VLLM_SERVER_DEV_MODE": "1"}),
            vllm(env={"VLLM_PLUGINS": "mine", "VLLM_HOST_IP": "10.0.0.1"}),
        ],
    ),
    "PD632": Case(
        told(EngineCommand(version="0.29.0"), has_state=True),
        quiet=[told(EngineCommand(version="0.30.0"), has_state=True), told(OLDER)],
    ),
    "PD633": Case(
        vllm(has_state=True, **STOCK),
        quiet=[vllm(has_state=True, env=DS, **STOCK), vllm(has_state=True), vllm(**STOCK)],
    ),
    "PD636": Case(
        vllm(decode__tensor_parallel_size=3, **CACHED_STATES),
        told(FOUND, OLDEST, **CACHED_STATES),
        told(FOUND, decode__tensor_parallel_size=3, **CACHED_STATES),
        told(FOUND, decode__tensor_parallel_size=3, has_state=True, **STOCK),
        quiet=[
            told(FOUND, **CACHED_STATES),
            vllm(**CACHED_STATES),
            vllm(has_state=True, prefill__enable_prefix_caching=True, **STOCK),
            vllm(has_state=True, **STOCK),
            told(FOUND, has_state=True, **STOCK),
            told(FOUND, OLDEST, decode__tensor_parallel_size=3, has_state=True, **STOCK),
            vllm(enable_prefix_caching=True, **STOCK),
        ],
    ),
    "PD639": Case(
        vllm(**CACHED_STATES), quiet=[told(FOUND, **CACHED_STATES), vllm(has_state=True, **STOCK)]
    ),
    "PD620": Case(
        vllm(paths=("/a", "/b"), **STOCK),
        quiet=[vllm(paths=("/a", "/a"), **STOCK), vllm(paths=("/a", "/b"))],
    ),
    "PD625": Case(
        differing(dcp=2),
        differing(kv_cache_dtype="fp8"),
        differing(sc={"method": "ngram"}),
        differing(lora_modules=["a=/a"]),
        quiet=[
            differing(max_log_len=2),
            differing(max_loras=2),
            args(kv_cache_dtype="fp8"),
            args(sc={"method": "ngram"}),
        ],
    ),
    "PD626": Case(
        vllm(prefill__tensor_parallel_size=3, decode__tensor_parallel_size=2),
        vllm(GPU, prefill__tensor_parallel_size=16),
        vllm(prefill__pipeline_parallel_size=2),
        vllm(pipeline_parallel_size=2, decode__tensor_parallel_size=3),
        quiet=[
            vllm(pipeline_parallel_size=2, tensor_parallel_size=3),
            vllm(GPU, prefill__tensor_parallel_size=8),
            vllm(prefill__tensor_parallel_size=16, **LATENT),
        ],
    ),
}
