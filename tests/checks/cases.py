"""For every rule: contexts in which it fires, and near misses in which it stays quiet."""

from dataclasses import dataclass, replace

from pdlaunch.checks.context import Context, PairTransport
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import ConfigError
from pdlaunch.platform.facts import Availability, Limits, NixlInstall, PortState, SharedMemory
from tests.checks.contexts import CPU, GB200, GIB, GPU, SHAPE, SMALL_SHAPE, on

ROUTER = ("127.0.0.1", 8000)
PAIR = PairTransport("decode-0/rank-0", "prefill-0/rank-0", "nixl/UCX", "cuda", 390.0, 400.0)
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
EXPERTS = replace(SHAPE, model_type="gpt_oss", num_experts=32)
SLIDING = replace(SMALL_SHAPE, layer_windows=(1024,) * 30)
TIER = {"kv_offload__host_memory": "8GiB"}


@dataclass(frozen=True)
class Case:
    fires: list[Context]
    quiet: list[Context]


def machine(base=CPU, **changes):
    return replace(base, **changes)


def libraries(base=CPU, **changes):
    return replace(base, libraries=replace(base.libraries, **changes))


def mooncake(base):
    return on(base, kv_transfer__connector="mooncake")


class NeedsCuda(KVTransferSettings):
    """Those of a connector that moves device memory only."""

    @property
    def needs_cuda(self):
        return True


def needing_cuda(base):
    context = on(base)
    config = context.config.model_copy(update={"kv_transfer": NeedsCuda()})
    return replace(context, launch=replace(context.launch, config=config))


def advertising(context, address):
    """The context with another address that ranks tell their peers."""
    roles = {
        role: replace(engines, advertise_address=address)
        for role, engines in context.engines.items()
    }
    return replace(context, launch=replace(context.launch, roles=roles))


def one_gpu(**changes):
    return replace(GPU, gpus=GPU.gpus[:1], **changes)


CASES: dict[str, Case] = {
    "PD101": Case(
        [on(CPU, prefill__replicas=0, decode__replicas=0)], [on(CPU, prefill__replicas=0)]
    ),
    "PD102": Case(
        [on(CPU, prefill__replicas=0), on(CPU, decode__replicas=0)],
        [on(CPU, prefill__replicas=0, decode__replicas=0)],
    ),
    "PD103": Case([on(CPU, model_error=ConfigError("no such model", fix="name one"))], [on(CPU)]),
    "PD104": Case(
        [on(CPU, prefill__tensor_parallel_size=2), on(GPU, decode__tensor_parallel_size=64)],
        [on(CPU, prefill__tensor_parallel_size=3)],
    ),
    "PD105": Case(
        [on(CPU, decode__tensor_parallel_size=2), on(GPU, decode__tensor_parallel_size=12)],
        [on(GPU, decode__tensor_parallel_size=16), on(CPU, decode__tensor_parallel_size=9)],
    ),
    "PD106": Case(
        [on(CPU, max_model_len=8193), on(CPU, decode__max_model_len=9000)],
        [on(CPU, max_model_len=8192)],
    ),
    "PD107": Case(
        [on(CPU, kv_transfer__lease_s=20.0)],
        [on(CPU, kv_transfer__lease_s=5.0, kv_transfer__pull_timeout_s=4.0)],
    ),
    "PD108": Case([on(GPU, block_size=24)], [on(CPU, block_size=24), on(GPU, block_size=48)]),
    "PD109": Case(
        [on(CPU, block_size=128, max_model_len=100)], [on(CPU, block_size=128, max_model_len=128)]
    ),
    "PD110": Case([on(CPU, max_num_batched_tokens=63)], [on(CPU, max_num_batched_tokens=64)]),
    "PD111": Case([on(CPU, kv_transfer__verify="off")], [on(CPU, kv_transfer__verify="on")]),
    "PD112": Case(
        [on(CPU, host="0.0.0.0"), on(CPU, host="::")],
        [on(CPU, host="localhost"), on(CPU, host="0.0.0.0", api_key="k"), on(CPU, host="::1")],
    ),
    "PD113": Case(
        [on(CPU, limits__request_timeout_s=20.0)],
        [on(CPU, limits__request_timeout_s=20.5)],
    ),
    "PD114": Case(
        [
            on(CPU, gpu_memory_utilization=0.9),
            on(GPU, gpu_memory_utilization=0.5, kv_cache_memory="4GiB"),
        ],
        [on(GPU, gpu_memory_utilization=0.5)],
    ),
    "PD115": Case(
        [on(CPU, num_threads=9)], [on(CPU, num_threads=8), on(machine(cpus=(0,)), num_threads=1)]
    ),
    "PD116": Case([on(CPU, startup_timeout_s=20.0)], [on(CPU, startup_timeout_s=20.5)]),
    "PD117": Case([on(CPU, load_format="dummy")], [on(CPU, load_format="auto")]),
    "PD118": Case(
        [on(GPU, decode__tensor_parallel_size=2, shapes=(EXPERTS, EXPERTS))],
        [on(GPU, shapes=(EXPERTS, EXPERTS)), on(GPU, decode__tensor_parallel_size=2)],
    ),
    "PD119": Case(
        [on(CPU, probes={"weight_errors": {"decode": ConfigError("only pickles", fix="convert")}})],
        [
            on(
                CPU,
                prefill__replicas=0,
                probes={"weight_errors": {"prefill": ConfigError("only pickles")}},
            )
        ],
    ),
    "PD201": Case(
        [
            on(GPU, enable_sleep_mode=True, enable_cumem_allocator=False),
            on(GPU, enable_cumem_allocator=False, decode__enable_sleep_mode=True),
        ],
        [on(GPU, enable_sleep_mode=True), on(GPU, enable_cumem_allocator=False)],
    ),
    "PD202": Case(
        [
            on(CPU, enable_cumem_allocator=True),
            on(GPU, enable_cumem_allocator=True, device="cpu"),
            on(
                machine(GPU, cumem=Availability(False, "cuInit failed")),
                decode__enable_cumem_allocator=True,
            ),
        ],
        [on(CPU, enable_cumem_allocator=False), on(GPU, enable_cumem_allocator=True)],
    ),
    "PD203": Case(
        [
            on(CPU, enable_sleep_mode=True),
            on(machine(GPU, cumem=Availability(False, "old")), enable_sleep_mode=True),
        ],
        [on(GPU, enable_sleep_mode=True), on(CPU, enable_cumem_allocator=True)],
    ),
    "PD204": Case(
        [
            on(GPU, environ=EXPANDABLE),
            on(GPU, environ={"PYTORCH_ALLOC_CONF": " expandable_segments : true "}),
            on(GPU, environ={"PYTORCH_HIP_ALLOC_CONF": "expandable_segments:1"}),
            on(GPU, environ=EXPANDABLE | {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}),
            on(GPU, environ={}, decode__env=EXPANDABLE),
        ],
        [
            on(GPU, environ=EXPANDABLE, enable_cumem_allocator=True),
            on(GPU, environ=EXPANDABLE, enable_sleep_mode=True),
            on(
                GPU,
                environ={
                    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,expandable_segments:False"
                },
            ),
            on(
                GPU,
                environ={
                    "PYTORCH_CUDA_ALLOC_CONF": "",
                    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
                },
            ),
            on(
                GPU,
                environ=EXPANDABLE,
                env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"},
            ),
        ],
    ),
    "PD205": Case(
        [on(GPU, environ={"PYTORCH_ALLOC_CONF": "expandable_segments:true"})],
        [on(GPU, environ={"PYTORCH_ALLOC_CONF": "expandable_segments: Tr ue"})],
    ),
    "PD206": Case(
        [on(GPU, environ=EXPANDABLE | {"PYTORCH_ALLOC_CONF": "max_split_size_mb:100"})],
        [
            on(GPU, environ=EXPANDABLE),
            on(GPU, environ=EXPANDABLE | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ],
    ),
    "PD207": Case(
        [
            on(machine(GPU, gpus=tuple(replace(gpu, memory_bytes=16 * GIB) for gpu in GPU.gpus))),
            on(GPU, kv_cache_memory="130GiB"),
        ],
        [
            on(
                machine(GPU, gpus=tuple(replace(gpu, memory_bytes=16 * GIB) for gpu in GPU.gpus)),
                prefill__tensor_parallel_size=2,
                decode__tensor_parallel_size=2,
                max_num_batched_tokens=4096,
            ),
            on(GPU, kv_cache_memory="100GiB"),
        ],
    ),
    "PD208": Case(
        [on(CPU, max_model_len=8192, kv_cache_memory="64MiB"), on(CPU, kv_cache_memory="1KiB")],
        [on(CPU, max_model_len=1024, kv_cache_memory="64MiB"), on(CPU, kv_cache_memory="64MiB")],
    ),
    "PD209": Case(
        [on(CPU, kv_cache_memory="64MiB")],
        [
            on(CPU, max_model_len=8192, kv_cache_memory="64MiB"),
            on(CPU, kv_cache_memory="64MiB", shapes=(SLIDING, SLIDING)),
            on(CPU, kv_cache_memory="1KiB"),
        ],
    ),
    "PD210": Case(
        [on(one_gpu()), on(one_gpu(), kv_cache_memory="60GiB")],
        [
            on(one_gpu(), gpu_memory_utilization=0.45),
            on(one_gpu(), kv_cache_memory="20GiB"),
            on(GPU),
        ],
    ),
    "PD211": Case(
        [on(one_gpu(), gpu_memory_utilization=0.4)],
        [on(GPU, prefill__replicas=4, decode__replicas=4)],
    ),
    "PD212": Case(
        [on(CPU, kv_cache_memory="40GiB"), on(CPU, decode__replicas=60)],
        [on(CPU, kv_cache_memory="20GiB")],
    ),
    "PD213": Case(
        [
            on(GPU, enable_cumem_allocator=True, kv_transfer__nixl__path="nixl"),
            on(GPU, enable_sleep_mode=True, kv_transfer__nixl__path="nixl"),
            on(GPU, enable_sleep_mode=True, kv_transfer__connector="mooncake"),
        ],
        [
            on(GPU, kv_transfer__nixl__path="nixl"),
            on(GB200, enable_cumem_allocator=True, kv_transfer__nixl__path="nixl"),
            on(GPU, enable_cumem_allocator=True),
        ],
    ),
    "PD220": Case(
        [
            on(CPU, **TIER, enable_prefix_caching=False),
            on(CPU, **TIER, decode__enable_prefix_caching=False),
        ],
        [
            on(CPU, **TIER),
            on(CPU, enable_prefix_caching=False),
            on(CPU, **TIER, decode__kv_offload__host_memory=0),
        ],
    ),
    "PD221": Case(
        [on(CPU, kv_offload__host_memory="31GiB"), on(GPU, **TIER, decode__replicas=8)],
        [
            on(CPU, kv_offload__host_memory="28GiB"),
            on(GPU, kv_offload__host_memory="32GiB"),
            on(CPU, kv_cache_memory="40GiB"),
        ],
    ),
    "PD222": Case(
        [on(machine(GPU, limits=Limits(GIB, 65536)), **TIER)],
        [
            on(GPU, **TIER),
            on(machine(limits=Limits(GIB, 65536)), **TIER),
            on(machine(GPU, limits=Limits(32 * GIB, 65536)), **TIER),
        ],
    ),
    "PD223": Case(
        [on(CPU, kv_offload__host_memory="1GiB"), on(GPU, **TIER, kv_cache_memory="40GiB")],
        [on(CPU, **TIER), on(GPU, **TIER), on(CPU, **TIER, kv_offload__policy="lru")],
    ),
    "PD224": Case(
        [
            on(CPU, kv_offload__host_memory="64KiB"),
            on(CPU, **TIER, prefill__kv_offload__host_memory="100KiB"),
            on(
                GPU,
                shapes=(SMALL_SHAPE, SMALL_SHAPE),
                block_size=1,
                kv_offload__host_memory="64KiB",
            ),
        ],
        [on(CPU, kv_offload__host_memory="1MiB")],
    ),
    "PD225": Case(
        [on(CPU, kv_offload__policy="lru"), on(CPU, prefill__kv_offload__policy="lru")],
        [
            on(CPU, **TIER, kv_offload__policy="lru"),
            on(CPU, **TIER, kv_offload__policy="lru", decode__kv_offload__host_memory=0),
            on(CPU),
        ],
    ),
    "PD301": Case(
        [
            on(GPU, shapes=(SHAPE, SMALL_SHAPE)),
            on(CPU, shapes=(SMALL_SHAPE, replace(SMALL_SHAPE, vocab_size=1))),
        ],
        [on(CPU, shapes=(SMALL_SHAPE, replace(SMALL_SHAPE, eos_token_ids=(7,))))],
    ),
    "PD302": Case(
        [on(CPU, paths=("/models/a", "/models/b"))],
        [on(CPU, paths=("/models/a", "/models/x/../a"))],
    ),
    "PD303": Case(
        [on(CPU, prefill__dtype="float32"), on(GPU, decode__dtype="float16")],
        [on(GPU, decode__dtype="bfloat16"), on(CPU, dtype="float32")],
    ),
    "PD304": Case(
        [on(CPU, decode__block_size=32)], [on(CPU, block_size=32, decode__block_size=32)]
    ),
    "PD305": Case([on(CPU, shapes=(SMALL_SHAPE, SLIDING))], [on(CPU, shapes=(SLIDING, SLIDING))]),
    "PD306": Case(
        [on(CPU, shapes=(SMALL_SHAPE, replace(SMALL_SHAPE, num_kv_heads=9)))],
        [on(CPU, decode__tensor_parallel_size=3)],
    ),
    "PD307": Case(
        [on(GPU, prefill__tensor_parallel_size=2, decode__tensor_parallel_size=3)],
        [on(GPU, prefill__tensor_parallel_size=2, decode__tensor_parallel_size=4)],
    ),
    "PD308": Case(
        [on(GPU, prefill__tensor_parallel_size=4, decode__tensor_parallel_size=2)],
        [on(GPU, prefill__tensor_parallel_size=2, decode__tensor_parallel_size=4), on(GPU)],
    ),
    "PD309": Case([on(CPU, decode__max_model_len=4096)], [on(CPU, prefill__max_model_len=4096)]),
    "PD310": Case([on(CPU, decode__load_format="dummy")], [on(CPU, load_format="dummy")]),
    "PD311": Case([on(GPU, prefill__device="cpu")], [on(GPU, device="cpu")]),
    "PD313": Case(
        [on(GPU, prefill__enable_cumem_allocator=True), on(GPU, decode__enable_sleep_mode=True)],
        [on(GPU, enable_cumem_allocator=True), on(CPU, prefill__enable_cumem_allocator=True)],
    ),
    "PD400": Case([on(machine(system="Darwin"))], [on(CPU)]),
    "PD401": Case([on(libraries(torch=None)), on(libraries(transformers=None))], [on(CPU)]),
    "PD402": Case(
        [on(libraries(nixl=NixlInstall())), on(libraries(nixl=NixlInstall("1.5.1")))], [on(CPU)]
    ),
    "PD403": Case(
        [
            on(libraries(nixl=NixlInstall("1", {"cu12": "1"}, frozenset()))),
            on(
                libraries(
                    GPU, nixl=NixlInstall("1", {"cu12": "1", "cu13": "1"}, frozenset({"cu12"}))
                )
            ),
        ],
        [
            on(
                libraries(
                    GPU, nixl=NixlInstall("1", {"cu12": "1", "cu13": "1"}, frozenset({"cu13"}))
                )
            )
        ],
    ),
    "PD404": Case(
        [on(CPU, probes={"import_errors": {"nixl": "undefined symbol"}})],
        [on(CPU, probes={"import_errors": {}})],
    ),
    "PD437": Case(
        [on(CPU, probes={"connector_errors": {"theirs": "connector theirs cannot be imported"}})],
        [on(CPU, probes={"connector_errors": {}})],
    ),
    "PD438": Case([needing_cuda(CPU)], [needing_cuda(GPU), on(CPU)]),
    "PD405": Case(
        [on(libraries(GPU, nixl=NixlInstall("1", {"cu12": "1"}, frozenset({"cu12"}))))],
        [on(libraries(nixl=NixlInstall("1", {"cu12": "1"}, frozenset({"cu12"})))), on(GPU)],
    ),
    "PD406": Case([on(libraries(GPU, torch="2.13.0+cpu", torch_cuda=None))], [on(CPU), on(GPU)]),
    "PD407": Case(
        [on(machine(GPU, driver_cuda=(12, 8)))], [on(libraries(GPU, torch_cuda="12.8")), on(GPU)]
    ),
    "PD408": Case(
        [
            mooncake(CPU),
            mooncake(libraries(mooncake=True, missing_for_mooncake=("libibverbs.so.1",))),
            mooncake(libraries(mooncake=True, mooncake_version="0.3.12.post9")),
        ],
        [
            mooncake(libraries(mooncake=True, mooncake_version="0.3.13.post1")),
            mooncake(libraries(mooncake=True)),
            on(libraries(mooncake=True, missing_for_mooncake=("libibverbs.so.1",))),
        ],
    ),
    "PD409": Case([mooncake(CPU)], [on(CPU)]),
    "PD410": Case([on(CPU, device="cuda")], [on(CPU), on(GPU, device="cuda")]),
    "PD411": Case(
        [on(GPU, decode__tensor_parallel_size=16)], [on(GPU, decode__tensor_parallel_size=8)]
    ),
    "PD412": Case([on(machine(cpus=(0,)))], [on(machine(cpus=(0, 1)))]),
    "PD413": Case(
        [on(machine(has_native_bf16=False), dtype="bfloat16"), on(CPU, dtype="float16")],
        [on(CPU, dtype="bfloat16"), on(machine(has_native_bf16=False))],
    ),
    "PD414": Case(
        [on(machine(limits=Limits(8 << 20, 65536), rdma_devices=("mlx5_0",)))],
        [on(machine(limits=Limits(8 << 20, 65536))), on(machine(rdma_devices=("mlx5_0",)))],
    ),
    "PD415": Case([on(machine(limits=Limits(-1, 1024)))], [on(machine(limits=Limits(-1, 4096)))]),
    "PD416": Case(
        [on(machine(shm=SharedMemory(64 << 20, 64 << 20)))],
        [on(machine(shm=SharedMemory(1 << 30, 1 << 30)))],
    ),
    "PD417": Case([on(machine(shm=SharedMemory(GIB, GIB, ("ucx_shm_posix_1",))))], [on(CPU)]),
    "PD418": Case(
        [mooncake(machine(limits=Limits(-1, 65536, can_bind_to_device=False)))],
        [mooncake(CPU), on(machine(limits=Limits(-1, 65536, can_bind_to_device=False)))],
    ),
    "PD419": Case(
        [on(CPU, probes={"folder_problems": {"kv_transfer.file.directory": "/kv is no folder"}})],
        [on(CPU, probes={"folder_problems": {}})],
    ),
    "PD420": Case(
        [on(CPU, probes={"ports": {ROUTER: PortState("busy")}})],
        [on(CPU, probes={"ports": {ROUTER: PortState()}})],
    ),
    "PD421": Case(
        [on(CPU, port=80, probes={"ports": {("127.0.0.1", 80): PortState("privileged")}})],
        [on(CPU, probes={"ports": {ROUTER: PortState("busy")}})],
    ),
    "PD422": Case(
        [
            on(CPU, probes={"ports": {ROUTER: PortState("not here")}}),
            on(CPU, probes={"ports": {ROUTER: PortState("unknown host")}}),
        ],
        [on(CPU, probes={"ports": {ROUTER: PortState()}})],
    ),
    "PD424": Case(
        [on(CPU, CPU), advertising(on(CPU, CPU), "0.0.0.0")],
        [on(CPU), advertising(on(CPU, CPU), "10.0.0.1")],
    ),
    "PD425": Case(
        [on(CPU, prefill__tensor_parallel_size=3)],
        [on(CPU), on(GPU, prefill__tensor_parallel_size=2)],
    ),
    "PD430": Case(
        [on(GPU, environ={"UCX_TLS": "rc,sm,tcp"}), on(GPU, environ={"UCX_TLS": "^cuda"})],
        [on(GPU, environ={"UCX_TLS": "rc,cuda_copy"}), on(CPU, environ={"UCX_TLS": "tcp"})],
    ),
    "PD431": Case(
        [on(GPU, environ={"UCX_TLS": "rc,cuda_copy"})], [on(GPU, environ={"UCX_TLS": "^tcp"})]
    ),
    "PD432": Case(
        [on(CPU, environ={"UCX_TLS": "posix"})], [on(CPU, environ={"UCX_TLS": "tcp,sm"}), on(CPU)]
    ),
    "PD433": Case([on(CPU, environ={"UCX_TLS": "tcp"})], [on(CPU, environ={"UCX_TLS": "posix"})]),
    "PD434": Case(
        [on(machine(rdma_devices=("mlx5_0",)), CPU, environ={"UCX_TLS": "tcp,sm"})],
        [
            on(machine(rdma_devices=("mlx5_0",)), environ={"UCX_TLS": "tcp,sm"}),
            on(machine(rdma_devices=("mlx5_0",)), CPU, environ={"UCX_TLS": "rc"}),
        ],
    ),
    "PD435": Case(
        [on(GB200, environ={"UCX_CUDA_IPC_ENABLE_MNNVL": "n"})],
        [
            on(GB200, environ={"UCX_CUDA_IPC_ENABLE_MNNVL": "y"}),
            on(GPU, environ={"UCX_CUDA_IPC_ENABLE_MNNVL": "n"}),
        ],
    ),
    "PD436": Case(
        [on(GPU, environ={"UCX_CUDA_IPC_ENABLE_MNNVL": "y"})],
        [on(GB200, environ={"UCX_CUDA_IPC_ENABLE_MNNVL": "y"}), on(GPU)],
    ),
    "PD501": Case(
        [on(CPU, pairs=(replace(PAIR, error="REMOTE_DISCONNECT"),))], [on(CPU, pairs=(PAIR,))]
    ),
    "PD502": Case(
        [on(CPU, pairs=(PAIR, replace(PAIR, bytes_equal=False)))], [on(CPU, pairs=(PAIR,))]
    ),
    "PD503": Case(
        [
            on(GPU, pairs=(replace(PAIR, allocator=allocator, gigabytes_per_s=0.6),))
            for allocator in ("cumem", "expandable_segments")
        ],
        [
            on(GPU, pairs=(replace(PAIR, allocator="cumem", path="p2p"),)),
            on(GPU, pairs=(replace(PAIR, gigabytes_per_s=0.6),)),
        ],
    ),
    "PD504": Case(
        [
            on(GPU, pairs=(replace(PAIR, gigabytes_per_s=12.0),)),
            on(GPU, pairs=(replace(PAIR, gigabytes_per_s=199.0),)),
        ],
        [
            on(GPU, pairs=(replace(PAIR, gigabytes_per_s=300.0),)),
            on(GPU, pairs=(replace(PAIR, allocator="cumem", gigabytes_per_s=0.6),)),
            on(
                GPU,
                pairs=(
                    replace(PAIR, gigabytes_per_s=None),
                    replace(PAIR, expected_gigabytes_per_s=None),
                ),
            ),
        ],
    ),
    "PD505": Case(
        [on(CPU, pairs=(PAIR,))],
        [on(CPU, pairs=(replace(PAIR, gigabytes_per_s=None), replace(PAIR, error="gone")))],
    ),
}
