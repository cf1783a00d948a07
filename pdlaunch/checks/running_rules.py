"""Rules PD65x and PD66x check a running deployment; ``pdlaunch doctor`` uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pdlaunch.checks.context import Context
from pdlaunch.checks.probed import SeenDeployment, SeenEngine, SeenPair, is_slow
from pdlaunch.checks.rule import Found, error, info, warning
from pdlaunch.config.roles import PAIR, ROLES, Role
from pdlaunch.config.sizes import format_size

_BYTES_ALONE = (
    "; READs of other requests may be among them, as decode does not tell what it had to compute: "
    "start it with --enable-prompt-tokens-details"
)
_NO_TRANSPORT = (
    "; the transport of UCX is unknown: start decode with UCX_PROTO_INFO=y and its output in a "
    "file, and run doctor on its host"
)
_ENOUGH_ANSWERS = 10
_CANARY_TOKENS = 4  # no canary has prefill make more tokens


def _deployment(context: Context) -> SeenDeployment:
    return context.probes.deployment or SeenDeployment((), None)


def _engines(context: Context) -> Sequence[SeenEngine]:
    return _deployment(context).engines


def _pairs(context: Context) -> Sequence[SeenPair]:
    return _deployment(context).pairs or ()


def _of(role: Role) -> Callable[[Context], Sequence[SeenEngine]]:
    return lambda context: _deployment(context).of(role)


def _differ(
    context: Context,
    what: str,
    value_of: Callable[[SeenEngine], str | None],
    roles: Sequence[Role] = PAIR,
) -> Iterator[Found]:
    """Yield the engines whose value differs from that of the first engine with a value."""
    # Engines without a value are skipped.
    engines = [each for role in roles for each in _deployment(context).of(role)]
    told = [(each, value) for each in engines if (value := value_of(each))]
    for each, value in told[1:]:
        first, expected = told[0]
        if value != expected:
            yield Found(f"{what} {value}, of {first.name} {expected}", each.name)


def _versions(context: Context) -> Iterator[Found]:
    yield from _differ(context, "kind", lambda each: each.kind)
    yield from _differ(context, "version", lambda each: each.version)


def _models(context: Context) -> Iterator[Found]:
    yield from _differ(context, "models", lambda each: ", ".join(sorted(each.models)), ROLES)
    prefill, decode = (
        min((each.max_model_len for each in _of(role)(context) if each.max_model_len), default=0)
        for role in PAIR
    )
    if 0 < decode < prefill:
        yield Found(f"prefill takes {prefill} tokens, decode {decode}", "decode engines")


def _caches(context: Context) -> Iterator[Found]:
    yield from _differ(context, "block size", lambda each: each.block_size)
    yield from _differ(context, "KV dtype", lambda each: each.cache_dtype)


def _seen(context: Context) -> Iterator[Found]:
    for each in _engines(context):
        if not each.problem:
            reads = f", {_reads(each)}" if each.role == "decode" else ""
            kind = {"vllm": "vLLM"}.get(each.kind, each.kind)
            yield Found(f"{kind} {each.version}{reads}", each.name)
    yield from (Found(path, pair) for pair, (path, _) in _deployment(context).told_pairs.items())
    for pair in _pairs(context):
        if not pair.problem:
            moved = f"a canary moved {format_size(pair.num_bytes)} in {pair.seconds:.2f} s"
            over = f" over {pair.transport}" if pair.transport else _NO_TRANSPORT
            caveat = "" if pair.is_told else _BYTES_ALONE
            yield Found(f"{moved}{over}{caveat}", f"{pair.prefill} -> {pair.decode}")


def _reads(each: SeenEngine) -> str:
    speed = each.gigabytes_per_s
    told = "too few to tell a speed" if speed is None else f"{speed:.2f} GB/s"
    pieces = f" in pieces of {format_size(each.piece_bytes)}" if each.piece_bytes else ""
    return f"{format_size(each.bytes_read)} read{pieces}, {told}"


def _slow(context: Context) -> Iterator[Found]:
    # Engines do not tell what joins them: the slowest of the links is what all should give.
    slow = (each for each in _engines(context) if is_slow(each.gigabytes_per_s, "hosts"))
    yield from (Found(_reads(each), each.name) for each in slow)
    told = _deployment(context).told_pairs.items()
    yield from (Found(slow, pair) for pair, (_, slow) in told if slow)


def _whole_answers(each: SeenEngine) -> Found | None:
    count, tokens = each.num_answers, each.answer_tokens
    if count < _ENOUGH_ANSWERS or tokens <= _CANARY_TOKENS * count:
        return None
    return Found(f"{count} answers of {tokens / count:.1f} tokens on average", each.name)


# fmt: off
RULES = (
    error("PD650", "An engine does not answer.",
        "Nothing else is said of it.",
        over=_engines, when=lambda each: each.problem and Found(each.problem, each.name),
        fix="Start it, or correct its URL; give its key with --engine-key-env, which is sent to "
        "those engines alone that --prefill, --decode or --both name.",
        source="GET /health, /version, /v1/models and /metrics.", needs=("deployment",)),
    error("PD651", "Engines are of different kinds or versions.",
        "All are healthy; the handshake of each such pair fails, and decode computes every prompt "
        "itself.",
        when=_versions,
        fix="Run the same engine in the same version everywhere.",
        source="vLLM's NIXL handshake refuses another version (compute_nixl_compatibility_hash).",
        needs=("deployment",)),
    error("PD652", "Engines do not serve the same model.",
        "A request names its model to all that work on it, and any engine of both roles may get "
        "it.",
        when=_models,
        fix="Serve the same model by the same name, and no longer requests on prefill than decode.",
        source="GET /v1/models.", needs=("deployment",)),
    error("PD653", "KV blocks of the engines have different sizes or dtypes.",
        "Blocks are handed over as bytes: in another dtype they are other numbers.",
        when=_caches,
        fix="Start all engines with the same --block-size, --dtype and --kv-cache-dtype.",
        source="vllm:cache_config_info in /metrics.", needs=("deployment",)),
    error("PD654",
        "A pair does not hand KV blocks over, or decode answers other tokens than it should.",
        "Health says nothing of it: decode computes such prompts itself, or with other blocks.",
        over=_pairs,
        when=lambda pair: pair.problem and Found(pair.problem, f"{pair.prefill} -> {pair.decode}"),
        fix="Read the error and the logs of both engines; restart the one that is wrong.",
        source="A canary: a new prompt through prefill and decode, compared with prefill alone.",
        needs=("canary",)),
    warning("PD655", "A decode engine has computed prompts, and has never read a KV block.",
        "Prefill engines stand idle, and requests are none the faster for them.",
        over=_of("decode"),
        when=lambda each: each.prompt_tokens and not each.bytes_read
        and Found(f"{each.prompt_tokens} tokens of prompts, 0 KV bytes read", each.name),
        fix="Have the router send prompts to prefill first, and its kv_transfer_params to decode.",
        source="vllm:nixl_bytes_transferred and vllm:prompt_tokens, or pdlaunch_kv_transfer_bytes "
        "and pdlaunch_prefix_cache_queries; modelplaneai/modelplane#175.", needs=("deployment",)),
    warning("PD656", "Leases have ended before decode had read their blocks.",
        "vLLM's prefill gives such blocks to other requests; a late read succeeds, and decode "
        "answers with the text of another prompt (HTTP 200). Native engines compute such prompts "
        "again.",
        over=_engines,
        when=lambda each: each.num_expired
        and Found(f"{each.num_expired} leases have expired since its start", each.name),
        fix="Raise kv_lease_duration of the prefill engine, or give decode more room.",
        source="vllm:nixl_num_kv_expired_reqs or pdlaunch_kv_leases_expired in /metrics.",
        needs=("deployment",)),
    warning("PD657", "Transfers of KV blocks have failed.",
        "By its load-failure policy an engine has computed such prompts again, or ended their "
        "requests.",
        over=_engines,
        when=lambda each: each.num_failed
        and Found(f"{each.num_failed} transfers have failed since its start", each.name),
        fix="Look for NIXL's errors in the logs of this engine and its peers.",
        source="vllm:nixl_num_failed_transfers and _notifications, or "
        "pdlaunch_kv_transfer_failures, in /metrics.", needs=("deployment",)),
    warning("PD658", "An engine runs in dev mode.",
        "Whoever can connect runs any method in it, without a key.",
        over=_engines,
        when=lambda each: each.has_dev_mode
        and Found("dev mode is on: /server_info answers", each.name),
        fix="Unset VLLM_SERVER_DEV_MODE, unless engines are to sleep and nobody else can connect.",
        source="GET /server_info, which dev mode adds together with /collective_rpc.",
        needs=("deployment",)),
    info("PD660", "An engine or a pair was observed at work.",
        "The speed is the mean of all READs since the start, given once 64 MiB were read. READs at "
        "the same time share a link.",
        when=_seen,
        fix="",
        source="/version and /metrics of each engine, and a canary through each pair.",
        needs=("deployment",)),
    error("PD661", "Prefill tells decode to shake hands with it at an address that is not its own.",
        "vLLM binds and advertises the same variable. At 0.0.0.0, and at localhost from another "
        "host, decode dials itself, and computes the prompt itself.",
        over=_pairs,
        when=lambda pair: pair.wrong_address
        and Found(pair.wrong_address, f"prefill {pair.prefill}"),
        fix="Start prefill with VLLM_NIXL_SIDE_CHANNEL_HOST set to its own address, seen from "
        "decode.", source="remote_host in prefill's kv_transfer_params; volcano-sh/kthena#1781.",
        needs=("canary",)),
    warning("PD663", "KV blocks come slowly.",
        "Less than 0.6 GB/s is half of 10 Gbit Ethernet, and what UCX gives where it copies "
        "through the host. READs that share a link explain a part of such a gap. Routers of "
        "pdlaunch tell which pairs were slow when they were measured (PD504).",
        when=_slow,
        fix="Look for KV caches in CuMem pools or expandable segments, which NIXL copies through "
        "the host; for UCX_TLS and UCX_NET_DEVICES that leave the fast device out; and for what "
        "else uses the link.",
        source="Time and bytes of READs in /metrics; between two H200s 0.44 GB/s from CuMem "
        "pools, 340 to 394 GB/s else.", needs=("deployment",)),
    warning("PD664", "A prefill engine makes whole answers.",
        "It is to draw one token of each. vLLM takes max_completion_tokens over max_tokens: "
        "behind a router that sets the latter alone, prefill makes the answer of each such chat, "
        "and decode makes it once more.",
        over=_of("prefill"), when=_whole_answers,
        fix="Have the router set max_completion_tokens to 1 beside max_tokens: 1 when it asks "
        "prefill, and send whole requests to other engines.",
        source="vllm:request_generation_tokens in /metrics; vllm-project/vllm-ascend#11882.",
        needs=("deployment",)),
)
# fmt: on
