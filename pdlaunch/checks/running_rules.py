"""Rules PD65x and PD66x check a running deployment; ``pdlaunch doctor`` uses them."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from pdlaunch.checks.probed import SeenDeployment, SeenEngine, SeenPair, is_slow
from pdlaunch.checks.rule import Context, Found, error, info, warning
from pdlaunch.config.roles import PAIR, ROLES, Role
from pdlaunch.config.sizes import format_size

_BYTES_ALONE = (
    "; READs of other requests may be included, because decode does not report which tokens it "
    "computed: start decode with --enable-prompt-tokens-details"
)
_NO_TRANSPORT = (
    "; the transport of UCX is unknown: start decode with UCX_PROTO_INFO=y, write its output to a "
    "file, and run doctor on the same host"
)
_ENOUGH_ANSWERS = 10
_CANARY_TOKENS = 4  # a canary requests at most this many tokens from prefill


def _deployment(context: Context) -> tuple[SeenDeployment]:
    return (context.probes.deployment or SeenDeployment((), None),)


def _engines(context: Context) -> Sequence[SeenEngine]:
    return _deployment(context)[0].engines


def _pairs(context: Context) -> Sequence[SeenPair]:
    return _deployment(context)[0].pairs or ()


def _of(role: Role) -> Callable[[Context], Sequence[SeenEngine]]:
    return lambda context: _deployment(context)[0].of(role)


def _differ(
    seen: SeenDeployment,
    values: Mapping[str, Callable[[SeenEngine], str | None]],
    roles: Sequence[Role] = PAIR,
) -> Iterator[Found]:
    """Yield the engines whose value differs from that of the first engine with a value."""
    # Engines that report no value are skipped.
    engines = [each for role in roles for each in seen.of(role)]
    for what, value_of in values.items():
        told = [(each, value) for each in engines if (value := value_of(each))]
        for each, value in told[1:]:
            first, expected = told[0]
            if value != expected:
                yield Found(f"{what} {value}, of {first.name} {expected}", each.name)


def _models(seen: SeenDeployment) -> Iterator[Found]:
    yield from _differ(seen, {"models": lambda each: ", ".join(sorted(each.models))}, ROLES)
    limits = [[each.max_model_len for each in seen.of(role) if each.max_model_len] for role in PAIR]
    prefill, decode = (min(found, default=0) for found in limits)
    if 0 < decode < prefill:
        yield Found(f"prefill takes {prefill} tokens, decode {decode}", "decode engines")


def _seen(seen: SeenDeployment) -> Iterator[Found]:
    for each in seen.engines:
        if not each.problem:
            reads = f", {_reads(each)}" if each.role == "decode" else ""
            kind = {"vllm": "vLLM"}.get(each.kind, each.kind)
            yield Found(f"{kind} {each.version}{reads}", each.name)
    told = seen.reported_pairs
    yield from (Found(path, pair) for pair, (path, _) in told.items())
    for pair in seen.pairs or ():
        if not pair.problem:
            moved = f"a canary moved {format_size(pair.num_bytes)} in {pair.seconds:.2f} s"
            unknown = "" if pair.name in told else _NO_TRANSPORT
            over = f" over {pair.transport}" if pair.transport else unknown
            caveat = "" if pair.is_reported else _BYTES_ALONE
            yield Found(f"{moved}{over}{caveat}", pair.name)


def _reads(each: SeenEngine) -> str:
    speed = each.gigabytes_per_s
    told = "too few to measure a speed" if speed is None else f"{speed:.2f} GB/s"
    pieces = f" in pieces of {format_size(each.piece_bytes)}" if each.piece_bytes else ""
    return f"{format_size(each.bytes_read)} read{pieces}, {told}"


def _slow(seen: SeenDeployment) -> Iterator[Found]:
    for each in seen.engines:
        # Engines do not report their link, so all are compared with a link between hosts. A router
        # reports slow pairs of native engines itself: small READs spend their time on other things.
        is_reported = each.label and each.kind == "native"
        if is_slow(each.gigabytes_per_s, "hosts") and not is_reported:
            yield Found(_reads(each), each.name)
    yield from (Found(slow, pair) for pair, (_, slow) in seen.reported_pairs.items() if slow)


def _whole_answers(each: SeenEngine) -> Found | None:
    count, tokens = each.num_answers, each.answer_tokens
    if count < _ENOUGH_ANSWERS or tokens <= _CANARY_TOKENS * count:
        return None
    return Found(f"{count} answers of {tokens / count:.1f} tokens on average", each.name)


# fmt: off
RULES = (
    error("PD650", "An engine does not answer.",
        "Other rules cannot judge this engine.",
        over=_engines, when=lambda each: each.problem and Found(each.problem, each.name),
        fix="Start it, or correct its URL. If it needs a key, use --engine-key-env; the key is "
        "sent only to engines that --prefill, --decode or --both name.",
        source="GET /health, /version, /v1/models and /metrics.", needs=("deployment",)),
    error("PD651", "Engines are of different kinds or versions.",
        "All engines are healthy, but the handshake of each such pair fails, and decode computes "
        "every prompt itself.",
        over=_deployment,
        when=lambda seen: _differ(
            seen, {"kind": lambda each: each.kind, "version": lambda each: each.version}),
        fix="Run the same engine in the same version everywhere.",
        source="vLLM's NIXL handshake refuses another version (compute_nixl_compatibility_hash).",
        needs=("deployment",)),
    error("PD652", "Engines do not serve the same model.",
        "A request names its model, and the router may send it to any engine of a role.",
        over=_deployment, when=_models,
        fix="Serve the same model by the same name. Set max_model_len of prefill to decode's.",
        source="GET /v1/models.", needs=("deployment",)),
    error("PD653", "KV blocks of the engines have different sizes or dtypes.",
        "Blocks are copied as bytes. In another dtype the bytes are other numbers.",
        over=_deployment,
        when=lambda seen: _differ(seen, {
            "block size": lambda each: each.block_size, "KV dtype": lambda each: each.cache_dtype}),
        fix="Start all engines with the same --block-size, --dtype and --kv-cache-dtype.",
        source="vllm:cache_config_info in /metrics.", needs=("deployment",)),
    error("PD654",
        "A pair does not transfer KV blocks, or decode answers with wrong tokens.",
        "Both engines stay healthy: decode computes such prompts itself, or uses wrong blocks.",
        over=_pairs,
        when=lambda pair: pair.problem and Found(pair.problem, pair.name),
        fix="Read the error and the logs of both engines; restart the one at fault.",
        source="A canary: a new prompt through prefill and decode, compared with prefill alone.",
        needs=("canary",)),
    warning("PD655", "A decode engine has computed prompts, and has never read a KV block.",
        "Prefill engines have no effect on such requests.",
        over=_of("decode"),
        when=lambda each: each.prompt_tokens and not each.bytes_read
        and Found(f"{each.prompt_tokens} tokens of prompts, 0 KV bytes read", each.name),
        fix="Make the router send prompts to prefill first, and its kv_transfer_params to decode.",
        source="vllm:nixl_bytes_transferred and vllm:prompt_tokens, or pdlaunch_kv_transfer_bytes "
        "and pdlaunch_prefix_cache_queries; modelplaneai/modelplane#175.", needs=("deployment",)),
    warning("PD656", "Leases have ended before decode had read their blocks.",
        "vLLM's prefill gives such blocks to other requests. A late read succeeds, and decode "
        "answers with the text of another prompt (HTTP 200). Native engines recompute such "
        "prompts.",
        over=_engines,
        when=lambda each: each.num_expired
        and Found(f"{each.num_expired} leases have expired since its start", each.name),
        fix="Raise kv_lease_duration of the prefill engine, or give decode more KV cache.",
        source="vllm:nixl_num_kv_expired_reqs or pdlaunch_kv_leases_expired in /metrics.",
        needs=("deployment",)),
    warning("PD657", "Transfers of KV blocks have failed.",
        "An engine recomputes such prompts or fails their requests, by its load-failure policy.",
        over=_engines,
        when=lambda each: each.num_failed
        and Found(f"{each.num_failed} transfers have failed since its start", each.name),
        fix="Look for NIXL's errors in the logs of this engine and its peers.",
        source="vllm:nixl_num_failed_transfers and _notifications, or "
        "pdlaunch_kv_transfer_failures, in /metrics.", needs=("deployment",)),
    warning("PD658", "An engine runs in dev mode.",
        "Anyone who can connect can run any method in it, without a key.",
        over=_engines,
        when=lambda each: each.has_dev_mode
        and Found("dev mode is on: /server_info answers", each.name),
        fix="Unset VLLM_SERVER_DEV_MODE, unless you use sleep mode and only you can connect.",
        source="GET /server_info, which dev mode adds together with /collective_rpc.",
        needs=("deployment",)),
    info("PD660", "An engine or a pair was observed at work.",
        "The speed is the mean of all READs since the start. It is shown after 64 MiB. READs at "
        "the same time share a link.",
        over=_deployment, when=_seen,
        fix="",
        source="/version and /metrics of each engine, and a canary through each pair.",
        needs=("deployment",)),
    error("PD661", "Prefill advertises an address at which decode cannot reach it.",
        "vLLM binds and advertises the same variable. With 0.0.0.0, or with localhost from another "
        "host, decode connects to itself, and computes the prompt itself.",
        over=_pairs,
        when=lambda pair: pair.wrong_address
        and Found(pair.wrong_address, f"prefill {pair.prefill}"),
        fix="Set VLLM_NIXL_SIDE_CHANNEL_HOST of prefill to an address that decode can reach.",
        source="remote_host in prefill's kv_transfer_params; volcano-sh/kthena#1781.",
        needs=("canary",)),
    warning("PD663", "KV blocks arrive slowly.",
        "0.6 GB/s is half the speed of 10 Gbit Ethernet, and the speed of UCX when it copies "
        "through the host. READs that share a link explain part of such a gap. Routers of "
        "pdlaunch report which pairs were slow when they were measured (PD504).",
        over=_deployment, when=_slow,
        fix="Look for KV caches in CuMem pools or expandable segments, which NIXL copies through "
        "the host; for values of UCX_TLS and UCX_NET_DEVICES that exclude the fast device; and for "
        "other users of the link.",
        source="Time and bytes of READs in /metrics; between two H200s 0.44 GB/s from CuMem "
        "pools, 340 to 394 GB/s otherwise.", needs=("deployment",)),
    warning("PD664", "A prefill engine generates whole answers.",
        "Prefill should generate one token of each answer. vLLM prefers max_completion_tokens to "
        "max_tokens. If the router sets only max_tokens, prefill generates the whole answer of "
        "each such chat, and decode generates it a second time.",
        over=_of("prefill"), when=_whole_answers,
        fix="Make the router set max_completion_tokens and max_tokens to 1 for prefill, and send "
        "whole requests to other engines.",
        source="vllm:request_generation_tokens in /metrics; vllm-project/vllm-ascend#11882.",
        needs=("deployment",)),
)
# fmt: on
