"""Rules PD423 to PD433 judge the ways of KV blocks, PD5xx what was measured between the ranks."""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.checks.context import Context, ucx_peers
from pdlaunch.checks.probed import PairTransport
from pdlaunch.checks.rule import Found, error, info, warning
from pdlaunch.planning.role_engines import RoleEngines
from pdlaunch.planning.roles import PlacedEngine

CLIFF_GIGABYTES_PER_S = 1.5
"""Below this, memory that no peer can map is the likely cause: 0.4 to 0.6 GB/s were measured."""
FAR_GIGABYTES_PER_S = 0.6
"""Between hosts: half of what 10 Gbit Ethernet carries."""
GPU_GIGABYTES_PER_S = 10.0
"""Between GPUs of a host: PCIe 4.0 x16 carries 25 GB/s, NVLink 300 and more."""
CPU_GIGABYTES_PER_S = 0.1
"""Between processes on CPUs: a loaded machine reached 0.3 to 0.8 GB/s, a quiet one 2."""

_UNMAPPABLE = ("cumem", "expandable_segments")
_TRUSTED = "kv_transfer.trusted_network"
_PORTS = "UCX 1.19 and Mooncake 0.3.13: neither knows whom it talks to (measured)."
_UCX = "UCX_TLS, UCX 1.19 as NIXL 1.5.1 ships it."


def far_engines(context: Context) -> list[PlacedEngine]:
    """Return the engines that exchange KV blocks with engines on other hosts."""
    return [engine for engine in context.launch.engines if engine.engines.has_far_peers]


def _opening_engines(context: Context) -> list[PlacedEngine]:
    """Return those of them that open ports for it."""
    return far_engines(context) if context.kv_transfer.connector_section.opens_data_ports else []


def _names_of_hosts(context: Context) -> str:
    return ", ".join(dict.fromkeys(engine.host.name for engine in far_engines(context)))


def _p2p_between_hosts(context: Context) -> str:
    if not far_engines(context) or context.kv_transfer.connector_section.joins_hosts:
        return ""
    return f"p2p does not join the hosts {_names_of_hosts(context)}"


def _untrusted_network(context: Context) -> str:
    if not _opening_engines(context) or context.kv_transfer.trusted_network:
        return ""
    return (
        f"engines of a pair are on different hosts ({_names_of_hosts(context)}), and their network "
        "is not said to be trusted"
    )


def _tls(each: RoleEngines) -> str:
    return f"UCX_TLS {each.given_environ.get('UCX_TLS', 'all')[:80]!a}"


def _measured(context: Context) -> Iterator[tuple[PairTransport, str]]:
    """Go over the pairs of ranks, each with what kept it from a faster path."""
    settings = context.kv_transfer
    for pair in context.probes.transport or ():
        # Why no faster path is in use stands in the finding: the user would ask next.
        reasons = [f"{path}: {said}" for path, said in pair.other_paths.items()]
        if settings.connector == "nixl" and settings.nixl.path != "auto":
            untried = "P2P" if settings.nixl.path == "nixl" else "NIXL"
            path = f"kv_transfer.nixl.path is {settings.nixl.path}"
            reasons.append(f"{path}: {untried} was not tried")
        if pair.path.startswith("nixl"):
            values = {each.given_environ.get("UCX_TLS") for each in context.pair or ()} - {None}
            reasons += sorted(f"UCX_TLS is {value}" for value in values)
        yield pair, "".join(f"; {reason}" for reason in reasons)


def _name(pair: PairTransport) -> str:
    return f"{pair.prefill_rank} -> {pair.decode_rank}"


def _is_cliff(pair: PairTransport) -> bool:
    speed = pair.gigabytes_per_s
    return pair.allocator in _UNMAPPABLE and speed is not None and speed < CLIFF_GIGABYTES_PER_S


def _cliff(item: tuple[PairTransport, str]) -> Found | None:
    pair, reasons = item
    if not _is_cliff(pair):
        return None
    moves = f"{pair.path} moves {pair.gigabytes_per_s:.2f} GB/s out of {pair.allocator} memory"
    return Found(f"{moves}: the 0.6 GB/s cliff{reasons}", _name(pair))


def _slow(item: tuple[PairTransport, str]) -> Found | None:
    pair, reasons = item
    speed, least = pair.gigabytes_per_s, _least_gigabytes_per_s(pair)
    if speed is None or speed >= least or _is_cliff(pair):
        return None
    between = f" from {pair.hosts[0]} to {pair.hosts[1]}" if pair.hosts else ""
    moves = f"{pair.path} moves {speed:.3g} GB/s{between}, less than {least:g}"
    return Found(f"{moves} ({pair.allocator} memory){reasons}", _name(pair))


def _least_gigabytes_per_s(pair: PairTransport) -> float:
    """Return the speed below which a pair is slow; 0 for a path of which nothing is known."""
    if pair.hosts is not None:
        return FAR_GIGABYTES_PER_S
    if not pair.path.startswith(("nixl", "p2p")):
        return 0.0
    return CPU_GIGABYTES_PER_S if pair.allocator == "host" else GPU_GIGABYTES_PER_S


# fmt: off
RULES = (
    error("PD423",
        "The path of KV blocks ends at the host, and engines of a pair are on different ones.",
        "Path p2p maps the memory of a peer, which only processes of the same host can.",
        when=_p2p_between_hosts, at="kv_transfer.nixl.path",
        fix="Set kv_transfer.nixl.path to auto, or place prefill and decode engines on one host.",
        source="Memory is mapped through file descriptors and handles of one kernel.",
        on_vllm=True),
    error("PD428", "KV blocks would go between hosts over ports that ask nobody who he is.",
        "NIXL's UCX and Mooncake cannot authenticate their peers, nor encrypt. Whoever reaches "
        "the data port of a rank can read and write the memory of its process. The side channel "
        "of vLLM's own connector tells everybody where that memory is, and ends at a query for a "
        "rank that does not exist.",
        when=_untrusted_network, at=_TRUSTED,
        fix=f"Set {_TRUSTED}: true where nobody else reaches that network (docs/hosts.md has the "
        "rules for a firewall), use connector file, or place prefill and decode engines on one "
        "host.", source=_PORTS, on_vllm=True),
    error("PD433", "UCX_TLS leaves no transport between processes of one host.",
        "pdlaunch leaves out whatever would listen on the network without authentication (tcp, "
        "RDMA) or open memory to other users (sysv, knem). posix has to be there: UCX finds its "
        "peers through it.",
        over=ucx_peers,
        when=lambda each: (
            "posix" not in each.ucx_transports
            and f"{_tls(each)} leaves nothing that connects two processes of this host; posix is "
            "missing"
        ), at="$UCX_TLS",
        fix="Unset UCX_TLS, or add posix.", source=_UCX, on_vllm=True),
    warning("PD503", "KV blocks lie in memory that a peer cannot map: the 0.6 GB/s cliff.",
        "CuMem pools and expandable segments without fabric handles cannot be opened by a peer "
        "through CUDA IPC. NIXL/UCX then copies through the host in small pieces, with no error: "
        "0.6 GB/s instead of 392 GB/s. The path p2p maps CuMem memory by its own handles, at full "
        "speed.",
        over=_measured, when=_cliff,
        fix="Let kv_transfer.nixl.path be auto or p2p; switch expandable_segments off; or give "
        "the host an IMEX channel (fabric handles).",
        source="Measured on two H200s with NIXL 1.5.1; vLLM 0.24 with --enable-cumem-allocator: "
        "0.44 GB/s.", needs=("transport",)),
    warning("PD504", "A pair of ranks is slow.",
        "Between GPUs of a host a good path gives 20 to 400 GB/s, between hosts at least half of "
        "10 Gbit Ethernet. Every prompt's first token waits for its blocks. Only the path in use "
        "is judged, and the finding says what the others gave.",
        over=_measured, when=_slow,
        fix="Let kv_transfer.nixl.path be auto, so that ranks of one host use P2P; look at "
        "UCX_TLS, at the placement of the ranks (one host, NUMA node, PCIe switch), and at what "
        "else uses the link.",
        source="The READ at the end of the handshake. P2P between two H200s: 340 to 394 GB/s; "
        "PCIe 4.0 x16 carries 25 GB/s, 10 Gbit Ethernet 1.2 GB/s.", needs=("transport",)),
    info("PD505", "KV blocks move between a pair of ranks at the speed that is shown.",
        "The time that a prompt's KV cache takes from prefill to decode is its size divided by "
        "this figure.",
        over=_measured,
        when=lambda it: (
            it[0].gigabytes_per_s is not None
            and Found(
                f"{it[0].path} moves {it[0].gigabytes_per_s:.3g} GB/s ({it[0].allocator} memory)",
                _name(it[0]),
            )
        ),
        fix="Nothing to fix; compare it with what the link should give.",
        source="The READs at the end of the handshake: up to 16 MiB of a CPU's memory, 128 MiB of "
        "a GPU's, in block-sized pieces.", needs=("transport",), on_vllm=True),
)
# fmt: on
