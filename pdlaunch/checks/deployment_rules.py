"""Rules PD65x judge a deployment that runs already, as ``pdlaunch doctor`` sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pdlaunch.checks.context import Context
from pdlaunch.checks.deployment import SeenDeployment, SeenEngine
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.roles import PAIR, ROLES, Role
from pdlaunch.config.sizes import format_size

VLLM_LEASE_S = 30
_BYTES_ALONE = (
    "; READs of other requests may be among them, as decode does not tell what it had to compute: "
    "start it with --enable-prompt-tokens-details"
)
_ENOUGH_ANSWERS = 10
_CANARY_TOKENS = 4
"""No canary has prefill make more tokens."""
SLOW_SHARE = 0.1
"""READs below this share of what their link should give go another way."""


@rule(
    "PD650",
    "error",
    fix=(
        "Start it, or correct its URL; give its key with --engine-key-env, which is sent to those "
        "engines alone that --prefill, --decode or --both name."
    ),
    source="GET /health, /version, /v1/models and /metrics.",
    needs=("deployment",),
)
def engine_silent(context: Context) -> Iterator[Found]:
    """An engine does not answer.

    Nothing else is said of it.
    """
    for engine in _deployment(context).engines:
        if engine.problem:
            yield Found(engine.name, engine.problem)


@rule(
    "PD651",
    "error",
    fix="Run the same engine in the same version everywhere.",
    source="vLLM's NIXL handshake refuses another version (compute_nixl_compatibility_hash).",
    needs=("deployment",),
)
def running_versions_differ(context: Context) -> Iterator[Found]:
    """Engines are of different kinds or versions.

    All are healthy; the handshake of each such pair fails, and decode computes every prompt itself.
    """
    yield from _differ(context, "kind", lambda engine: engine.kind)
    yield from _differ(context, "version", lambda engine: engine.version)


@rule(
    "PD652",
    "error",
    fix="Serve the same model by the same name, and no longer requests on prefill than decode.",
    source="GET /v1/models.",
    needs=("deployment",),
)
def running_models_differ(context: Context) -> Iterator[Found]:
    """Engines do not serve the same model.

    A request names its model to all that work on it, and any engine of both roles may get it.
    """
    yield from _differ(context, "models", lambda engine: ", ".join(sorted(engine.models)), ROLES)
    longest = [
        min((each.max_model_len for each in side if each.max_model_len), default=0)
        for side in (_deployment(context).of("prefill"), _deployment(context).of("decode"))
    ]
    if 0 < longest[1] < longest[0]:
        yield Found("decode engines", f"prefill takes {longest[0]} tokens, decode {longest[1]}")


@rule(
    "PD653",
    "error",
    fix="Start all engines with the same --block-size, --dtype and --kv-cache-dtype.",
    source="vllm:cache_config_info in /metrics.",
    needs=("deployment",),
)
def running_caches_differ(context: Context) -> Iterator[Found]:
    """KV blocks of the engines have different sizes or dtypes.

    Blocks are handed over as bytes: in another dtype they are other numbers.
    """
    yield from _differ(context, "block size", lambda engine: engine.block_size)
    yield from _differ(context, "KV dtype", lambda engine: engine.cache_dtype)


@rule(
    "PD654",
    "error",
    fix="Read the error and the logs of both engines; restart the one that is wrong.",
    source="A canary: a new prompt through prefill and decode, compared with prefill alone.",
    needs=("canary",),
)
def canary_died(context: Context) -> Iterator[Found]:
    """A pair does not hand KV blocks over, or decode answers other tokens than it should.

    Health says nothing of it: decode computes such prompts itself, or with other blocks.
    """
    for pair in _deployment(context).pairs or ():
        if pair.problem:
            yield Found(f"{pair.prefill} -> {pair.decode}", pair.problem)


@rule(
    "PD655",
    "warning",
    fix="Have the router send prompts to prefill first, and its kv_transfer_params to decode.",
    source=(
        "vllm:nixl_bytes_transferred and vllm:prompt_tokens, or pdlaunch_kv_transfer_bytes and "
        "pdlaunch_prefix_cache_queries; modelplaneai/modelplane#175."
    ),
    needs=("deployment",),
)
def prefill_never_used(context: Context) -> Iterator[Found]:
    """A decode engine has computed prompts, and has never read a KV block.

    Prefill engines stand idle, and requests are none the faster for them.
    """
    for engine in _deployment(context).of("decode"):
        if engine.prompt_tokens and not engine.bytes_read:
            yield Found(engine.name, f"{engine.prompt_tokens} tokens of prompts, 0 KV bytes read")


@rule(
    "PD656",
    "warning",
    fix="Raise kv_lease_duration of the prefill engine, or give decode more room.",
    source="vllm:nixl_num_kv_expired_reqs or pdlaunch_kv_leases_expired in /metrics.",
    needs=("deployment",),
)
def leases_expired(context: Context) -> Iterator[Found]:
    """Leases have ended before decode had read their blocks.

    vLLM's prefill gives such blocks to other requests; a late read succeeds, and decode answers
    with the text of another prompt (HTTP 200). Native engines compute such prompts again.
    """
    for engine in _deployment(context).engines:
        if engine.num_expired:
            yield Found(engine.name, f"{engine.num_expired} leases have expired since its start")


@rule(
    "PD657",
    "warning",
    fix="Look for NIXL's errors in the logs of this engine and its peers.",
    source=(
        "vllm:nixl_num_failed_transfers and _notifications, or pdlaunch_kv_transfer_failures, in "
        "/metrics."
    ),
    needs=("deployment",),
)
def transfers_failed(context: Context) -> Iterator[Found]:
    """Transfers of KV blocks have failed.

    By its load-failure policy an engine has computed such prompts again, or ended their requests.
    """
    for engine in _deployment(context).engines:
        if engine.num_failed:
            yield Found(engine.name, f"{engine.num_failed} transfers have failed since its start")


@rule(
    "PD658",
    "warning",
    fix="Unset VLLM_SERVER_DEV_MODE, unless engines are to sleep and nobody else can connect.",
    source="GET /server_info, which dev mode adds together with /collective_rpc.",
    needs=("deployment",),
)
def running_in_dev_mode(context: Context) -> Iterator[Found]:
    """An engine runs in dev mode.

    Whoever can connect runs any method in it, without a key.
    """
    for engine in _deployment(context).engines:
        if engine.has_dev_mode:
            yield Found(engine.name, "dev mode is on: /server_info answers")


@rule(
    "PD659",
    "warning",
    fix="Give --kv-transfer-config kv_role kv_both (or the role's own), policy recompute, 30 s.",
    source="kv_transfer_config in /server_info, where dev mode tells it.",
    needs=("deployment",),
)
def transfer_settings(context: Context) -> Iterator[Found]:
    """An engine's settings of KV transfers do not suit its role.

    A consumer hands nothing over and a producer reads nothing; policy `fail` ends requests that
    decode could compute itself; a lease under vLLM's own 30 s may end in the queue of decode.
    """
    for engine in _deployment(context).engines:
        wrong = "kv_consumer" if engine.role == "prefill" else "kv_producer"
        if engine.kv_role == wrong:
            yield Found(engine.name, f"kv_role is {wrong}")
        if engine.role == "decode" and engine.on_failure == "fail":
            yield Found(engine.name, "kv_load_failure_policy is fail")
        if engine.lease_s is not None and engine.lease_s < VLLM_LEASE_S:
            yield Found(engine.name, f"kv_lease_duration is {engine.lease_s} s")


@rule(
    "PD660",
    "info",
    fix="Nothing to fix.",
    source=(
        "/version and /metrics of each engine, and a canary through each pair. Links: NVML, "
        "/sys/class/net and /sys/class/infiniband of this host, a plain copy of its memory."
    ),
    needs=("deployment",),
)
def seen(context: Context) -> Iterator[Found]:
    """An engine or a pair was observed at work.

    The speed is the mean of all READs since the start, given once 64 MiB were read, beside what the
    slowest link to a prefill engine should give. READs at the same time share a link; PD663 judges
    what that cannot explain.
    """
    for engine in _deployment(context).engines:
        if not engine.problem:
            lease = "unknown" if engine.lease_s is None else f"{engine.lease_s} s"
            reads = f", {_read(engine)}" if engine.role == "decode" else ""
            kind = {"vllm": "vLLM"}.get(engine.kind, engine.kind)
            yield Found(engine.name, f"{kind} {engine.version}, lease {lease}{reads}")
    for pair in _deployment(context).pairs or ():
        if not pair.problem:
            moved = f"a canary moved {format_size(pair.num_bytes)} in {pair.seconds:.2f} s"
            caveat = "" if pair.is_told else _BYTES_ALONE
            yield Found(f"{pair.prefill} -> {pair.decode}", f"{moved}{caveat}")
        if pair.handshake:
            yield Found(f"side channel {pair.side_channel}", pair.handshake)


@rule(
    "PD661",
    "error",
    fix="Start prefill with VLLM_NIXL_SIDE_CHANNEL_HOST set to its own address, seen from decode.",
    source="remote_host in prefill's kv_transfer_params; volcano-sh/kthena#1781.",
    needs=("canary",),
)
def running_side_channel(context: Context) -> Iterator[Found]:
    """Prefill tells decode to shake hands with it at an address that is not its own.

    vLLM binds and advertises the same variable. At 0.0.0.0, and at localhost from another host,
    decode dials itself: it finds no engine there, or a wrong one, and computes the prompt itself.
    """
    for pair in _deployment(context).pairs or ():
        if pair.wrong_address:
            yield Found(f"prefill {pair.prefill}", pair.wrong_address)


@rule(
    "PD662",
    "error",
    fix="Restart this prefill engine; let nobody but its decode engines reach the side channel.",
    source="A question to the side channel for each rank that prefill names (--handshake).",
    needs=("handshake",),
)
def side_channel_silent(context: Context) -> Iterator[Found]:
    """The side channel of a prefill engine does not answer.

    Decode engines that have shaken hands before read on; those that are new, or are restarted,
    compute every prompt themselves. vLLM's listener ends at a question for a rank that does not
    exist, and the engine stays healthy.
    """
    for pair in _deployment(context).pairs or ():
        if pair.silence:
            where = f"prefill {pair.prefill}"
            yield Found(where, f"its side channel {pair.side_channel}: {pair.silence}")


@rule(
    "PD663",
    "warning",
    fix=(
        "Look for KV caches in CuMem pools or expandable segments, which NIXL copies through the "
        "host; for UCX_TLS and UCX_NET_DEVICES that leave the fast device out; and for what else "
        "uses the link."
    ),
    source=(
        "Time and bytes of READs in /metrics; between two H200s 0.44 GB/s from CuMem pools, 340 to "
        "394 GB/s else."
    ),
    needs=("deployment",),
)
def reads_are_slow(context: Context) -> Iterator[Found]:
    """KV blocks come far slower than over the link that is there.

    That is less than a tenth of what the link should give. READs that share it explain a part of
    such a gap, a path that does not use it explains all.
    """
    for engine in _deployment(context).engines:
        speed, expected = engine.gigabytes_per_s, engine.expected_gigabytes_per_s
        if speed is not None and expected is not None and speed < SLOW_SHARE * expected:
            yield Found(engine.name, _read(engine))


@rule(
    "PD664",
    "warning",
    fix=(
        "Have the router set max_completion_tokens to 1 beside max_tokens: 1 when it asks prefill, "
        "and send whole requests to other engines."
    ),
    source="vllm:request_generation_tokens in /metrics; vllm-project/vllm-ascend#11882.",
    needs=("deployment",),
)
def prefill_makes_answers(context: Context) -> Iterator[Found]:
    """A prefill engine makes whole answers.

    It is to draw one token of each. vLLM takes max_completion_tokens over max_tokens: behind a
    router that sets the latter alone, prefill makes the answer of each such chat, and decode makes
    it once more. An engine that had to serve alone for a while looks the same.
    """
    for engine in _deployment(context).of("prefill"):
        if (
            engine.num_answers >= _ENOUGH_ANSWERS
            and engine.answer_tokens > _CANARY_TOKENS * engine.num_answers
        ):
            mean = engine.answer_tokens / engine.num_answers
            yield Found(
                engine.name, f"{engine.num_answers} answers of {mean:.1f} tokens on average"
            )


def _read(engine: SeenEngine) -> str:
    """Return what a decode engine has read, how fast, and how fast it should be."""
    speed, expected = engine.gigabytes_per_s, engine.expected_gigabytes_per_s
    told = "too few to tell a speed" if speed is None else f"{speed:.2f} GB/s"
    should = "unknown" if expected is None else f"{expected:.3g} GB/s"
    link = f", its link should give {should} ({engine.link})" if engine.link else ""
    return f"{format_size(engine.bytes_read)} read, {told}{link}"


def _deployment(context: Context) -> SeenDeployment:
    return context.probes.deployment or SeenDeployment((), None)


def _differ(
    context: Context,
    what: str,
    value_of: Callable[[SeenEngine], str | None],
    roles: Sequence[Role] = PAIR,
) -> Iterator[Found]:
    """Yield the engines whose value is not that of the first engine that tells one."""
    engines = [each for role in roles for each in _deployment(context).of(role)]
    told = [(engine, value) for engine in engines if (value := value_of(engine))]
    for engine, value in told[1:]:
        if value != told[0][1]:
            first = told[0]
            yield Found(engine.name, f"{what} {value}, of {first[0].name} {first[1]}")
