"""Defines the settings of engines, and of roles: how many engines, and what they override."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from pdlaunch.config.field_types import (
    NATIVE_ALONE,
    ByteSize,
    Flag,
    FlagName,
    FrozenModel,
    OptionalSize,
    VariableName,
    may_override,
)
from pdlaunch.config.model_files.find import Revision
from pdlaunch.config.roles import EngineName

DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "dummy"]

DEFAULT_MODEL = "smollm2"


class KVOffloadSettings(FrozenModel):
    """Settings of the host tier, which keeps KV blocks in host memory."""

    host_memory: Annotated[OptionalSize, Flag("kv-offload-memory"), NATIVE_ALONE] = Field(
        0, description="Host memory of one rank for KV blocks, such as 32GiB; 0 for none."
    )


class EngineSettings(FrozenModel):
    """Holds settings of engines. They stand at the top level; each role may override them."""

    # fmt: off
    model: Annotated[str, Flag()] = Field(
        DEFAULT_MODEL, min_length=1,
        description="Alias, directory in Hugging Face layout, .gguf file, or a name on the hub "
        "such as Qwen/Qwen3-0.6B, which is downloaded.")
    revision: Annotated[Revision | None, Flag()] = Field(
        None,
        description="Branch, tag or commit of a model on the hub; its main branch when unset.")
    tensor_parallel_size: Annotated[
        int, Flag(of_role=Flag("{role}-tp", help="Ranks of a {role} engine."))
    ] = Field(1, gt=0, le=1024, description="Ranks of an engine.")
    pipeline_parallel_size: int = Field(
        1, gt=0, le=64,
        description="Pipeline stages of one vLLM engine; each stage has its share of the layers.")
    nnodes: int = Field(
        1, gt=0, le=64,
        description="Hosts of one vLLM engine; each runs the same number of its ranks.")
    data_parallel_size: int = Field(
        1, gt=0, le=64,
        description="Data parallel copies in one vLLM engine; only experts are split over them.")
    load_format: Annotated[LoadFormat, Flag()] = Field(
        "auto", description="`dummy` uses random weights, for benchmarks.")
    dtype: Annotated[DType, Flag(for_router=True)] = Field(
        "auto", description="`auto` takes the checkpoint's; float32 on a CPU without native bf16.")
    max_model_len: Annotated[int | None, Flag()] = Field(
        None, ge=2,
        description="Longest prompt plus output in tokens; the model's limit when unset.")
    block_size: Annotated[int, Flag()] = Field(16, gt=0, description="Tokens in a KV block.")
    kv_cache_memory: Annotated[ByteSize | None, Flag()] = Field(
        None,
        description="KV cache of one rank, such as 4GiB. When unset, 1GiB on a CPU and what "
        "gpu_memory_utilization leaves on a GPU.")
    gpu_memory_utilization: Annotated[float, Flag()] = Field(
        0.9, gt=0, le=1,
        description="Share of a GPU's total memory that a rank may use.")
    enable_prefix_caching: Annotated[bool, Flag()] = Field(
        True, description="Reuse KV blocks for later prompts that begin with the same tokens.")
    kv_offload: KVOffloadSettings = KVOffloadSettings()
    enable_cumem_allocator: Annotated[bool | None, Flag()] = Field(
        None, description="Allocate weights and KV cache from CuMem pools.")
    enable_sleep_mode: Annotated[bool, Flag()] = Field(
        False, description="Let engines sleep and wake up; turns the CuMem allocator on.")
    enforce_eager: Annotated[bool, Flag()] = Field(
        False, description="Run all steps on a GPU without CUDA graphs.")
    async_scheduling: Annotated[bool, Flag()] = Field(
        True, description="Prepare a GPU's next step on the CPU while one runs.")
    max_num_seqs: Annotated[int, Flag()] = Field(
        64, gt=0, description="Largest number of requests in one batch.")
    max_num_batched_tokens: Annotated[int | None, Flag()] = Field(
        None, gt=0, description="Tokens in one step; when unset, 512 on a CPU and 8192 on a GPU.")
    device: Annotated[Device, Flag()] = Field(
        "auto", description="`auto` takes GPUs where there are any, else the CPU.")
    num_threads: int | None = Field(
        None, gt=0, description="CPU threads of a rank; an even share of the cores when unset.")
    engine: Annotated[Literal["auto"] | EngineName, Flag(for_router=True)] = Field(
        "auto",
        description="Kind of engine: `vllm`, or `native`, pdlaunch's own. `auto` takes vLLM if its "
        "executable is found and the model is not the demo model, else native. For a router "
        "alone `auto` is native.")
    engine_command: Annotated[str, Flag()] = Field(
        "vllm", min_length=1,
        description="Executable of engines that are not native: a name on PATH or in the active "
        "environment, or a path.")
    engine_args: dict[FlagName, JsonValue] = Field(
        default_factory=dict,
        description="Further flags of engines that are not native, such as `max-logprobs: 5`; "
        "true for a flag without a value.")
    env: dict[VariableName, str] = Field(
        default_factory=dict, description="Extra environment variables of the ranks.")
    # fmt: on

    @property
    def ranks_of_copy(self) -> int:
        """Return the ranks of each data parallel copy: those of all pipeline stages."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def ranks_per_node(self) -> int:
        return max(1, self.ranks_of_copy * self.data_parallel_size // self.nnodes)


@may_override(EngineSettings)
class RoleSettings(FrozenModel):
    """Holds the number of engines of one role and their overrides of ``EngineSettings``."""

    replicas: Annotated[int, Flag("{role}", help="Number of {role} engines.")] = Field(
        1, ge=0, le=1024, description="Number of engines."
    )
    port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port of the first engine; the others take the next ports. Needs "
        "engine_api_key. 0 picks free ports.",
    )

    def ports(self) -> range:
        """Return the fixed ports of the engines in order; empty if engines take free ports."""
        return range(self.port, self.port + self.replicas) if self.port else range(0)


class BothSettings(RoleSettings):
    """Holds the settings of engines that do both prefill and decode of a request."""

    replicas: Annotated[
        int,
        Flag(
            "both",
            help="Number of engines that do both prefill and decode. If only this is given, the "
            "launch has no prefill and decode engines.",
        ),
    ] = Field(
        0,
        ge=0,
        le=1024,
        description="Number of engines; prefill.replicas and decode.replicas become 0 if neither "
        "is set.",
    )
