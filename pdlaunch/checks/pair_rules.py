"""Rules judge pairs: their settings (PD3xx), networks (PD423, PD428) and measured speed (PD504)."""

from collections.abc import Iterator
from pathlib import Path

from pdlaunch.checks.probed import LINK_GIGABYTES_PER_S, PairTransport, is_slow
from pdlaunch.checks.rule import Context, Found, Pair, error, warning
from pdlaunch.config.connectors import RDMA
from pdlaunch.config.sizes import format_size
from pdlaunch.machine.ucx_log import EMULATION

KV_LAYOUT = "pdlaunch's KV layout and handshake."
_SHAPE = (
    *("architecture", "model_type", "num_layers", "num_attention_heads", "num_kv_heads"),
    *("head_dim", "hidden_size", "vocab_size", "num_parameters"),
)
# At lower speeds, UCX copies GPU memory through the host: 0.3 to 0.6 GB/s were measured
CLIFF_GIGABYTES_PER_S = 1.5
# NIXL takes 4 us for each piece of a READ: with smaller pieces, that is most of its time
SMALL_PIECE_BYTES = 256 * 1024

_UNMAPPABLE = ("cumem", "expandable_segments")
_TRUSTED = "kv_transfer.trusted_network"
_PORTS = "UCX 1.19 and Mooncake 0.3.13 do not authenticate their peers (measured)."


def _different_shapes(sides: Pair) -> str:
    prefill, decode = (side.shape for side in sides)
    if prefill is None or decode is None:
        return ""
    # Field by field, so that the message names only the fields that differ.
    values = ((name, getattr(prefill, name), getattr(decode, name)) for name in _SHAPE)
    differing = [f"{name} ({left}, {right})" for name, left, right in values if left != right]
    if not differing and prefill.layer_windows != decode.layer_windows:
        differing = ["the windows of layers"]
    return f"prefill and decode differ in {', '.join(differing)}" if differing else ""


def _block_sizes(sides: Pair) -> Found | None:
    prefill, decode = (side.block_size for side in sides)
    # On GPUs, decode of vLLM can read blocks that are smaller than its own by a whole factor.
    may_be_parts = all(side.device == "cuda" and not side.is_native for side in sides)
    if prefill == decode or (may_be_parts and prefill and decode and decode % prefill == 0):
        return None
    sizes = [str(size or "what vLLM chooses") for size in (prefill, decode)]
    return Found(f"block_size of prefill is {sizes[0]}, of decode {sizes[1]}")


def _beside_both(context: Context) -> list[Pair]:
    """Return each side of the pair together with the engines of role ``both``."""
    both = context.engines.get("both")
    return [(other, both) for other in context.pair or ()] if both else []


def _both_differ(sides: Pair) -> Found | None:
    other, both = sides
    formats = [each.settings.load_format for each in sides]
    if formats[0] != formats[1]:
        message = f"load_format of {other.role} is {formats[0]}, of both {formats[1]}"
        return Found(message, "load_format")
    if other.shape != both.shape:
        return Found(f"{other.role} and both serve models of different shapes")
    left, right = other.model.path, both.model.path
    if left and right and Path(left).resolve() != Path(right).resolve():
        return Found(f"{other.role} serves {left}, both {right}")
    return None


def _hosts_of_pairs(context: Context) -> str:
    """Return the names of the hosts that exchange KV blocks with others; empty if none do."""
    far = [each.host.name for each in context.launch.engines if each.engines.has_far_peers]
    return ", ".join(dict.fromkeys(far))


def _p2p_between_hosts(context: Context) -> str:
    hosts, carrier = _hosts_of_pairs(context), context.kv_transfer.connector_section
    return f"p2p does not join the hosts {hosts}" if hosts and not carrier.joins_hosts else ""


def _untrusted_network(context: Context) -> str:
    hosts, transfer = _hosts_of_pairs(context), context.kv_transfer
    if not hosts or transfer.trusted_network or not transfer.connector_section.opens_data_ports:
        return ""
    return (
        f"engines of a pair are on different hosts ({hosts}), and no setting says that their "
        "network is trusted"
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
    """Yield possible reasons why this pair is slow."""
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
    error("PD301", "Prefill and decode serve models of different shapes.",
        "Only the same model can use the numbers in KV blocks. Each head's part of a block is one "
        "region, and a block holds the layers of one group. If the windows of layers differ, a "
        "block has no counterpart.",
        over=Context.pairs, when=_different_shapes, at="model",
        fix="Set model once, at the top level.", source=KV_LAYOUT, needs=("model",)),
    error("PD303", "Prefill and decode use different dtypes.",
        "KV blocks are copied as bytes. In another dtype the bytes are other numbers.",
        over=Context.pairs,
        when=lambda it: it[0].dtype and it[1].dtype and it[0].dtype != it[1].dtype and Found(),
        at="dtype", message="prefill computes in {0.dtype}, decode in {1.dtype}",
        fix="Set dtype once, at the top level.", source=KV_LAYOUT),
    error("PD304", "The block sizes of prefill and decode do not fit.",
        "Whole blocks are transferred, and their hashes chain over block_size tokens each. Only "
        "decode of vLLM on a GPU can use a multiple of prefill's block size. Without block_size, "
        "vLLM chooses a size.",
        over=Context.pairs, when=_block_sizes, at="block_size",
        fix="Set block_size once, at the top level.",
        source=f"{KV_LAYOUT} vLLM 0.32: _validate_remote_agent_handshake."),
    error("PD309", "Prefill accepts longer requests than decode.",
        "Prefill computes a prompt that decode then refuses. The work is lost, and the client gets "
        "a late error.",
        over=Context.pairs,
        when=lambda it: (longest := it[1].max_model_len) and (it[0].max_model_len or 0) > longest,
        at="max_model_len",
        message="prefill takes {0.max_model_len} tokens, decode {1.max_model_len}",
        fix="Set max_model_len once, at the top level.", source="The life of a request.",
        needs=("model",)),
    error("PD314", "The connector nixl cannot join a GPU and a CPU.",
        "On every path, a rank reads only from peers on the same kind of device. No pair would "
        "shake hands, and the launch would never be ready.",
        over=lambda context: context.pairs() if context.uses("nixl") else (),
        when=lambda it: it[0].device != it[1].device, at="device",
        message="prefill runs on {0.device} and decode on {1.device}, which the connector nixl "
        "does not join",
        fix="Set device once, at the top level, or set kv_transfer.connector to file.",
        source="The connector nixl: both of its paths join memory of one kind.", needs=("gpus",)),
    error("PD317", "Prefill and decode load different revisions of a model.",
        "The weights differ, and with them the meaning of the numbers in KV blocks. Answers are "
        "wrong, with HTTP 200.",
        over=Context.pairs,
        when=lambda it: it[0].settings.model == it[1].settings.model
        and it[0].settings.revision != it[1].settings.revision, at="revision",
        message="prefill loads revision {0.settings.revision}, decode {1.settings.revision}",
        fix="Set revision once, at the top level.",
        source="vllm-project/vllm#55776: NIXL's handshake does not compare revisions."),
    error("PD316", "Engines of role both serve another model than prefill and decode.",
        "The router treats these engines as equal. An answer would come from either model, and an "
        "answer that another engine continues would come from two.",
        over=_beside_both, when=_both_differ, at="model",
        fix="Set model and load_format once, at the top level.",
        source="The router sends requests to either, and continues a stream at the other.",
        needs=("model",)),
    error("PD423",
        "The path of KV blocks works only within a host, but engines of a pair are on different "
        "hosts.", "Path p2p maps the memory of a peer, which only processes of one host can do.",
        when=_p2p_between_hosts, at="kv_transfer.nixl.path",
        fix="Set kv_transfer.nixl.path to auto, or place prefill and decode engines on one host.",
        source="Memory is mapped through file descriptors and handles of one kernel."),
    error("PD428", "KV blocks would go between hosts over ports without authentication.",
        "NIXL's UCX and Mooncake can neither authenticate their peers nor encrypt. Anyone who "
        "reaches the data port of a rank can read and write the memory of its process. The side "
        "channel of vLLM's own connector reports to everyone where that memory is, and a query "
        "for a rank that does not exist ends it.",
        when=_untrusted_network, at=_TRUSTED,
        fix=f"Set {_TRUSTED}: true if no stranger can reach that network (docs/hosts.md has rules "
        "for a firewall), use connector file, or place prefill and decode engines on one host.",
        source=_PORTS),
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
        "GPU 0.3.", needs=("transport",)),
)
# fmt: on
