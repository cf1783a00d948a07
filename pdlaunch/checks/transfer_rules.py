"""Rules on KV transfers: networks and memory (PD423, PD428), measured pairs (PD504)."""

from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.probed import LINK_GIGABYTES_PER_S, PairTransport, is_slow
from pdlaunch.checks.rule import Found, error, warning
from pdlaunch.config.connectors import RDMA
from pdlaunch.config.sizes import format_size
from pdlaunch.machine.ucx_log import EMULATION
from pdlaunch.planning.roles import PlacedEngine

# At lower speeds, UCX copies GPU memory through the host: 0.3 to 0.6 GB/s were measured
CLIFF_GIGABYTES_PER_S = 1.5
# NIXL takes 4 us for each piece of a READ: with smaller pieces, that is most of its time
SMALL_PIECE_BYTES = 256 * 1024

_UNMAPPABLE = ("cumem", "expandable_segments")
_TRUSTED = "kv_transfer.trusted_network"
_PORTS = "UCX 1.19 and Mooncake 0.3.13 do not authenticate their peers (measured)."


def far_engines(context: Context) -> list[PlacedEngine]:
    """Return the engines that exchange KV blocks with engines on other hosts."""
    return [engine for engine in context.launch.engines if engine.engines.has_far_peers]


def _opening_engines(context: Context) -> list[PlacedEngine]:
    """Return the engines with peers on other hosts that open data ports."""
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
        f"engines of a pair are on different hosts ({_names_of_hosts(context)}), and no setting "
        "says that their network is trusted"
    )


def _slow_pairs(context: Context) -> Iterator[Found]:
    for pair in context.probes.transport or ():
        # Canaries of vLLM's own connector move too few bytes; connector file is for debugging.
        is_known = pair.hosts or pair.path.startswith(("nixl", "p2p", "mooncake"))
        is_timed = is_known and not pair.path.startswith("nixl/vLLM")
        between = " and ".join(pair.hosts or (pair.link,))
        if is_timed and is_slow(pair.gigabytes_per_s, pair.link):
            found = f"{pair.path} moves {pair.gigabytes_per_s:.3g} GB/s between {between}, less "
            found += f"than a tenth of {LINK_GIGABYTES_PER_S[pair.link]:g}"
        elif EMULATION in pair.path and pair.link == "GPUs of a host":
            found = f"{pair.path} joins {between}"
        else:
            continue
        reasons = (*_causes(context, pair), *_unused_paths(context, pair))
        yield Found("; ".join((found, *reasons)), f"{pair.prefill_rank} -> {pair.decode_rank}")


def _causes(context: Context, pair: PairTransport) -> Iterator[str]:
    """Yield the causes of a slow pair."""
    over_nixl, speed = pair.path.startswith("nixl"), pair.gigabytes_per_s or 0.0
    if EMULATION in pair.path:
        yield "UCX has no direct path to this memory and reads it by messages"
    if over_nixl and pair.link == "GPUs of a host":
        if speed < CLIFF_GIGABYTES_PER_S:
            unmappable = f": no peer can map {pair.allocator} memory without fabric handles"
            yield "UCX copies through the host" + unmappable * (pair.allocator in _UNMAPPABLE)
        elif 0 < pair.piece_bytes < SMALL_PIECE_BYTES:
            yield f"the pieces have {format_size(pair.piece_bytes)}: raise block_size"
    if pair.shares_gpu:
        yield "both ranks share a GPU"
    if pair.path == "mooncake/tcp" and not pair.hosts:
        yield "Mooncake uses TCP instead of shared memory"
    if over_nixl:
        values = {each.given_environ.get("UCX_TLS") for each in context.pair or ()} - {None}
        yield from sorted(f"UCX_TLS is {value}" for value in values)
        transports = {name for each in context.pair or () for name in each.ucx_transports}
        if pair.hosts and "tcp" in transports and not transports & RDMA:
            yield "UCX uses TCP: the hosts have no RDMA device"


def _unused_paths(context: Context, pair: PairTransport) -> Iterator[str]:
    """Yield the reasons why faster paths are not in use: the user's next question."""
    settings = context.kv_transfer
    if settings.is_stock and pair.path.startswith("nixl") and pair.link == "GPUs of a host":
        yield "kv_transfer.connector nixl maps the memory of its peers"
    yield from (f"{path}: {said}" for path, said in pair.other_paths.items())
    if settings.connector == "nixl" and settings.nixl.path != "auto":
        untried = "P2P" if settings.nixl.path == "nixl" else "NIXL"
        yield f"kv_transfer.nixl.path is {settings.nixl.path}: {untried} was not tried"


# fmt: off
RULES = (
    error("PD423",
        "The path of KV blocks works only within a host, but engines of a pair are on different "
        "hosts.", "Path p2p maps the memory of a peer, which only processes of one host can do.",
        when=_p2p_between_hosts, at="kv_transfer.nixl.path",
        fix="Set kv_transfer.nixl.path to auto, or place prefill and decode engines on one host.",
        source="Memory is mapped through file descriptors and handles of one kernel.",
        on_vllm=True),
    error("PD428", "KV blocks would go between hosts over ports without authentication.",
        "NIXL's UCX and Mooncake can neither authenticate their peers nor encrypt. Anyone who "
        "reaches the data port of a rank can read and write the memory of its process. The side "
        "channel of vLLM's own connector reports to everyone where that memory is, and a query "
        "for a rank that does not exist ends it.",
        when=_untrusted_network, at=_TRUSTED,
        fix=f"Set {_TRUSTED}: true if no stranger can reach that network (docs/hosts.md has rules "
        "for a firewall), use connector file, or place prefill and decode engines on one host.",
        source=_PORTS, on_vllm=True),
    warning("PD504", "A pair of ranks is slow.",
        "The first token of every prompt waits for its blocks. UCX copies memory that no peer can "
        "map (CuMem pools and expandable segments without fabric handles) through the host: 0.6 "
        "GB/s instead of 392, with no error. 'software emulation' between GPUs means the same at "
        "any speed. The rule judges the path in use and lists the speeds of the others.",
        when=_slow_pairs,
        fix="Set kv_transfer.connector to nixl and its path to auto, so that ranks on one host use "
        "P2P; turn expandable_segments off; check UCX_TLS, the placement of the ranks (one host, "
        "NUMA node, PCIe switch), and other users of the link.",
        source="The READ at the end of the handshake. Two H200s: P2P 340 to 394 GB/s, NIXL from "
        "CuMem pools 0.6; vLLM 0.24 with --enable-cumem-allocator 0.44, with both engines on one "
        "GPU 0.3.", needs=("transport",), on_vllm=True),
)
# fmt: on
