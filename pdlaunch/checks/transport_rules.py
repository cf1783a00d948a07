"""Rules PD5xx judge what was measured between the ranks, with the launch's own connector."""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.checks.context import Context, PairTransport
from pdlaunch.checks.rule import Found, rule

CLIFF_GIGABYTES_PER_S = 1.5
"""Below this, memory that no peer can map is the likely cause: 0.4 to 0.6 GB/s were measured."""
FAR_GIGABYTES_PER_S = 0.6
"""Below this, a pair of ranks on two hosts is slow."""
SLOW_SHARE = 0.5
"""A pair below this share of what its link should give is slow."""

_UNMAPPABLE = ("cumem", "expandable_segments")


@rule(
    "PD501",
    "error",
    fix=(
        "Read the error and the logs of both ranks; `pdlaunch check-config` lists what commonly "
        "closes a path. Where a path brings wrong bytes, leave it out (kv_transfer.nixl.path, "
        "UCX_TLS) and report it."
    ),
    source="The READ at the end of the handshake.",
    needs=("transport",),
    on_vllm=True,
)
def pair_broken(context: Context) -> Iterator[Found]:
    """Nothing can be moved between a pair of ranks.

    Every hand-over of this pair would fail, and decode would compute each prompt again. A path
    whose first READ brings other bytes than were sent is not used.
    """
    for pair in _pairs(context):
        if pair.error is not None:
            yield Found(_name(pair), f"{pair.path} moves nothing: {pair.error}")


@rule(
    "PD503",
    "warning",
    fix=(
        "Let kv_transfer.nixl.path be auto or p2p; switch expandable_segments off; or give the "
        "host an IMEX channel (fabric handles)."
    ),
    source=(
        "Measured on two H200s with NIXL 1.5.1; vLLM 0.24 with --enable-cumem-allocator: 0.44 GB/s."
    ),
    needs=("transport",),
)
def cliff(context: Context) -> Iterator[Found]:
    """KV blocks lie in memory that a peer cannot map: the 0.6 GB/s cliff.

    CuMem pools and expandable segments without fabric handles cannot be opened by a peer through
    CUDA IPC. NIXL/UCX then copies through the host in small pieces, with no error: 0.6 GB/s instead
    of 392 GB/s. The path p2p maps CuMem memory by its own handles, at full speed; the finding says
    why it is not in use. Only the path in use is judged.
    """
    for pair in _pairs(context):
        if _is_cliff(pair):
            message = (
                f"{pair.path} moves {pair.gigabytes_per_s:.2f} GB/s out of {pair.allocator} "
                "memory: the 0.6 GB/s cliff"
            )
            yield Found(_name(pair), message + _reasons(context, pair))


@rule(
    "PD504",
    "warning",
    fix=(
        "Let kv_transfer.nixl.path be auto, so that ranks of one host use P2P; with path nixl take "
        "larger blocks; look at UCX_TLS, at the placement of the ranks (NUMA node, PCIe switch), "
        "and at what else uses the link."
    ),
    source=(
        "The READ at the end of the handshake against what the link should give. Between GPUs: "
        "75 % of what the wires of their NVLinks carry, 80 % with PCIe, as NVML tells them (P2P "
        "between two H200s: 340 to 394 of 478 GB/s). On a CPU: a share of a plain copy."
    ),
    needs=("transport",),
)
def pair_slow(context: Context) -> Iterator[Found]:
    """A pair of ranks is far slower than its link.

    Time to first token on decode grows with every byte of the prompt's KV cache. Only the path in
    use is judged: with kv_transfer.nixl.path auto it is the fastest of those that can be used, and
    the finding says what the others gave, or why they cannot be used. Far slower is less than half
    of what a good path over the link gives. Two GPUs of a host are judged with the connector nixl,
    where NVML knows their NVLinks, or their PCIe slots at one CPU; not MIG devices, nor ranks whose
    env has a CUDA_DEVICE_ORDER.
    """
    for pair in _pairs(context):
        speed, expected = pair.gigabytes_per_s, pair.expected_gigabytes_per_s
        if (
            speed is not None
            and expected is not None
            and speed < SLOW_SHARE * expected
            and not _is_cliff(pair)  # PD503 tells these, with the reason.
        ):
            link = f" of {pair.link}" if pair.link else ""
            message = (
                f"{pair.path} moves {speed:.3g} GB/s where {expected:.3g} GB/s are expected{link} "
                f"({pair.allocator} memory)"
            )
            yield Found(_name(pair), message + _reasons(context, pair))


@rule(
    "PD505",
    "info",
    fix="Nothing to fix; compare it with what the link should give.",
    source=(
        "The READs at the end of the handshake: up to 16 MiB of a CPU's memory, 128 MiB of a "
        "GPU's, in block-sized pieces."
    ),
    needs=("transport",),
    on_vllm=True,
)
def pair_speed(context: Context) -> Iterator[Found]:
    """KV blocks move between a pair of ranks at the speed that is shown.

    The time that a prompt's KV cache takes from prefill to decode is its size divided by this
    figure.
    """
    for pair in _pairs(context):
        if pair.error is None and pair.gigabytes_per_s is not None:
            yield Found(
                _name(pair),
                f"{pair.path} moves {pair.gigabytes_per_s:.3g} GB/s ({pair.allocator} memory)",
            )


@rule(
    "PD506",
    "warning",
    fix=(
        "Place both sides of a pair on one host (placement_strategy pack), or on hosts with RDMA "
        "or a faster network; look at what else uses the network."
    ),
    source="The READ at the end of the handshake; 10 Gbit Ethernet carries 1.2 GB/s.",
    needs=("transport",),
)
def far_pair_slow(context: Context) -> Iterator[Found]:
    """KV blocks go from host to host at less than half the speed of 10 Gbit Ethernet.

    They take that much longer than on one host, which every prompt's first tokens wait for: with
    some networks decode would compute a prompt sooner than it pulls one.
    """
    for pair in _pairs(context):
        speed = pair.gigabytes_per_s
        if pair.hosts is not None and speed is not None and speed < FAR_GIGABYTES_PER_S:
            prefill, decode = pair.hosts
            message = f"{pair.path} moves {speed:.3g} GB/s from {prefill} to {decode}"
            yield Found(_name(pair), message + _reasons(context, pair))


def _pairs(context: Context) -> tuple[PairTransport, ...]:
    return context.probes.transport or ()


def _name(pair: PairTransport) -> str:
    return f"{pair.prefill_rank} -> {pair.decode_rank}"


def _reasons(context: Context, pair: PairTransport) -> str:
    """Return what kept the pair from a faster path, as far as that is known."""
    settings = context.config.kv_transfer
    reasons = [f"{path}: {said}" for path, said in pair.other_paths.items()]
    if settings.carrier == "nixl" and settings.nixl.path != "auto":
        untried = "P2P" if settings.nixl.path == "nixl" else "NIXL"
        reasons.append(f"kv_transfer.nixl.path is {settings.nixl.path}: {untried} was not tried")
    if pair.path.startswith("nixl"):
        values = {
            engine.given_environ["UCX_TLS"]
            for engine in context.peers()
            if "UCX_TLS" in engine.given_environ
        }
        reasons += [f"UCX_TLS is {value}" for value in sorted(values)]
    return "".join(f"; {reason}" for reason in reasons)


def _is_cliff(pair: PairTransport) -> bool:
    return (
        pair.allocator in _UNMAPPABLE
        and pair.gigabytes_per_s is not None
        and pair.gigabytes_per_s < CLIFF_GIGABYTES_PER_S
    )
