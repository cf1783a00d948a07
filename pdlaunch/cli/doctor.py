"""``pdlaunch doctor``: judge a running deployment, also one that pdlaunch did not start."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from urllib.parse import quote, urlsplit

import psutil
import typer

from pdlaunch.checks.probed import Probes, SeenDeployment, SeenEngine, SeenPair
from pdlaunch.checks.run import Report, all_rules, run_checks
from pdlaunch.cli.findings import StrictOption, print_report, refuse_input
from pdlaunch.cli.options import BothOption, DecodeOption, KeyEnvOption, PrefillOption
from pdlaunch.cli.output import FormatOption
from pdlaunch.config.external import UNIX, read_engine_url
from pdlaunch.config.hosts import LOCAL
from pdlaunch.config.http_names import WILDCARDS, is_loopback
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES, EngineName, Role
from pdlaunch.errors import ConfigError, PdlaunchError, ProtocolError
from pdlaunch.http.canary import BYTES_READ, SECONDS_READ, CanaryDied, send_canary
from pdlaunch.http.engine_calls import Counts, EngineApi
from pdlaunch.launch.client.api import own_launches
from pdlaunch.launch.engines import OF_RUNNING_ENGINES
from pdlaunch.machine.facts import Machine
from pdlaunch.machine.ucx_log import transport_of
from pdlaunch.planning.models import Model
from pdlaunch.planning.resolve import resolve

ASK_TIMEOUT_S = 10.0
INFO_TIMEOUT_S = 60.0  # vLLM gathers /server_info for more than 10 s on a busy machine
MEASURABLE_BYTES = 64 * 1024**2  # with fewer bytes, the start of READs takes most of the time
_ANSWER_TOKENS = "vllm:request_generation_tokens"
_NUM_PIECES = "vllm:nixl_num_descriptors_sum"
_CACHE = "vllm:cache_config_info"


# The same counter in vLLM and in native engines; an engine has only one of the two.
_PROMPT_TOKENS = ("vllm:prompt_tokens_total", "pdlaunch_prefix_cache_queries_total")
_EXPIRED = ("vllm:nixl_num_kv_expired_reqs_total", "pdlaunch_kv_leases_expired_total")
_FAILED = (
    "vllm:nixl_num_failed_transfers_total",
    "vllm:nixl_num_failed_notifications_total",
    "pdlaunch_kv_transfer_failures_total",
)


def doctor(
    routers: list[str] | None = typer.Argument(
        None,
        metavar="[URL]...",
        help="A pdlaunch router, which lists its engines; by default the router of your own launch "
        "on this machine.",
    ),
    prefill: PrefillOption = None,
    decode: DecodeOption = None,
    both: BothOption = None,
    engine_key_env: KeyEnvOption = None,
    exact: bool = typer.Option(
        False, "--exact", help="Require equal tokens from a canary, as float32 gives."
    ),
    canary: bool = typer.Option(True, help="Send a short prompt through each pair of engines."),
    output: FormatOption = "table",
    strict: StrictOption = False,
) -> None:
    """Find faults of running engines, of vLLM or native, without disturbing them.

    Each engine is asked for its health, version, models and metrics. Each pair gets one prompt of
    two KV blocks, with at most 4 output tokens.
    """
    try:
        key = None if engine_key_env is None else os.environ.get(engine_key_env)
        if engine_key_env is not None and not key:
            why, fix = "the variable is not set, or empty", "export it with the engines' key"
            raise ConfigError(why, field="--engine-key-env", value=engine_key_env, fix=fix)
        by_role: dict[Role, list[str] | None] = {"prefill": prefill, "decode": decode, "both": both}
        named = [(role, url) for role, given in by_role.items() for url in given or ()]
        for url in routers or ():
            _require_url("URL", url)
        for role, url in named:
            _require_url(f"--{role}", url)
        if not (routers or named):
            routers = [_own_launch()]
        asked = examine(routers or (), named, key, sends_canaries=canary, is_exact=exact)
        seen = asyncio.run(asked)
    except ConfigError as error:
        refuse_input(error, output)
    print_report(judge(seen), output, strict=strict)


def _require_url(name: str, url: str) -> None:
    fix = "write http://HOST:PORT, https://HOST:PORT, or unix:/PATH of a socket"
    if not url.startswith(("http://", "https://", UNIX)):
        raise ConfigError("not a URL", field=name, value=url, fix=fix)
    try:
        # A URL may have no path, which would be ignored, and no user and password.
        read_engine_url(url)
    except ValueError as error:
        raise ConfigError(str(error), field=name, fix=fix) from None


def _own_launch() -> str:
    """Return the URL of the only launch of this user on this machine. Raises ConfigError."""
    urls = sorted(launch.card.url for launch in own_launches(None))
    if len(urls) != 1:
        said = f"several of your launches run: {', '.join(urls)}" if urls else "no launch runs here"
        fix = "give the URL of a pdlaunch router, or --prefill URL --decode URL"
        raise ConfigError(f"no engine is named, and {said}", fix=fix)
    return urls[0]


def judge(seen: SeenDeployment) -> Report:
    """Apply the rules for running engines."""
    config = LaunchConfig.model_validate({"engine": "vllm"})
    unknown = Model("unknown", None, None, pending="running engines do not report it")
    roles: tuple[Role, ...] = ("prefill", "decode")
    launch = resolve(config, {LOCAL: Machine()}, {}, dict.fromkeys(roles, unknown))
    rules = [rule for rule in all_rules().values() if rule.code in OF_RUNNING_ENGINES]
    report = run_checks(launch, {}, Probes(deployment=seen), rules=rules)
    return replace(report, resolved={"deployment": asdict(seen)})


async def examine(
    routers: Sequence[str],
    named: Sequence[tuple[Role, str]],
    key: str | None,
    *,
    sends_canaries: bool,
    is_exact: bool,
) -> SeenDeployment:
    """Query the engines that are named or that routers list at the same time, then send a canary
    through each pair in turn. Raises ConfigError.
    """
    asked = dict.fromkeys(named)
    # Engines that only a router lists get no key: the router could list any server.
    keys = {url: key for _, url in named}
    labels, reported_pairs = dict[str, str](), dict[str, tuple[str, str]]()
    async with contextlib.AsyncExitStack() as stack:
        apis: dict[str, EngineApi] = {}

        def opened(url: str, key: str | None = None, prefix: str = "") -> EngineApi:
            api = EngineApi(url, key, prefix=prefix)
            stack.push_async_callback(api.close)
            return api

        for url in routers:
            own = own_launches(url) if url.startswith("http") else []
            # Engines of this user's launches refuse direct callers.
            socket_url = f"{UNIX}{own[0].admin_socket}" if own else None
            try:
                listed, pairs = await opened(socket_url or url).deployment(ASK_TIMEOUT_S)
                for role_name, engine, name in listed:
                    role = next((role for role in ROLES if role == role_name), None)
                    if role is None:
                        raise ProtocolError(f"it lists an engine of role {role_name[:100]}")
                    asked[role, engine], labels[engine] = None, name
                    prefix = f"/pdlaunch/engines/{quote(name, safe='')}" if socket_url else ""
                    apis[engine] = opened(socket_url or engine, keys.get(engine), prefix)
            except ProtocolError as error:
                why = f"not a router of this pdlaunch: {error}"
                fix = "name engines with --prefill and --decode: engines do not report their role"
                raise ConfigError(why, field="URL", value=url, fix=fix) from None
            reported_pairs |= pairs
        for url in keys:
            if url not in apis:
                apis[url] = opened(url, key)
        engines = await asyncio.gather(*(_look(role, url, apis[url]) for role, url in asked))
        labelled = (replace(each, label=labels.get(each.url, "")) for each in engines)
        seen = SeenDeployment(tuple(labelled), None, reported_pairs)
        if not sends_canaries:
            return seen
        # One canary at a time: simultaneous READs would share a link and look slow.
        proven = [
            await _prove(prefill, decode, apis, is_exact=is_exact)
            for prefill in seen.of("prefill")
            for decode in seen.of("decode")
        ]
        return replace(seen, pairs=tuple(proven))


async def _look(role: Role, url: str, api: EngineApi) -> SeenEngine:
    if (healthy := await api.is_healthy(ASK_TIMEOUT_S)) is not True:
        said = "does not answer" if healthy is None else "is not healthy"
        return SeenEngine(role, url, problem=f"it {said}: GET /health")
    try:
        counts = await api.counts(ASK_TIMEOUT_S)
        version = await api.version(ASK_TIMEOUT_S)
        models = await api.models(ASK_TIMEOUT_S)
    except ProtocolError as error:
        return SeenEngine(role, url, problem=str(error))
    info = await api.server_info(INFO_TIMEOUT_S)
    kind: EngineName = "native" if counts.has(_PROMPT_TOKENS[1]) else "vllm"
    num_bytes, seconds = int(counts.total(*BYTES_READ)), counts.total(*SECONDS_READ)
    num_pieces = _count(counts, _NUM_PIECES)
    is_measurable = seconds and num_bytes >= MEASURABLE_BYTES
    return SeenEngine(
        role,
        url,
        kind=kind,
        version=version,
        models=tuple(models),
        max_model_len=min(filter(None, models.values()), default=None),
        block_size=counts.label(_CACHE, "block_size"),
        cache_dtype=counts.label(_CACHE, "cache_dtype"),
        prompt_tokens=_count(counts, *_PROMPT_TOKENS),
        bytes_read=num_bytes,
        gigabytes_per_s=num_bytes / seconds / 1e9 if is_measurable else None,
        piece_bytes=num_bytes // num_pieces if num_pieces else 0,
        num_expired=_count(counts, *_EXPIRED),
        num_failed=_count(counts, *_FAILED),
        num_answers=_count(counts, f"{_ANSWER_TOKENS}_count"),
        answer_tokens=_count(counts, f"{_ANSWER_TOKENS}_sum"),
        has_dev_mode=info is not None,
    )


def _count(counts: Counts, *names: str) -> int:
    return sum(int(counts.total(name)) for name in names)


def is_here(url: str) -> bool:
    """Return True if a URL leads to this host, by the loopback device or one of its addresses."""
    host = urlsplit(url).hostname or ""
    if url.startswith(UNIX) or is_loopback(host):
        return True
    try:
        found = {str(address[0]) for *_, address in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    devices = psutil.net_if_addrs().values()
    return any(each.address.partition("%")[0] in found for device in devices for each in device)


def _transport(url: str) -> str:
    """Return UCX's transport from the log of an engine on this host, or an empty string."""
    if url.startswith(UNIX) or not is_here(url):
        return ""
    sockets = [it for it in psutil.net_connections("tcp") if it.status == psutil.CONN_LISTEN]
    listeners = {it.pid for it in sockets if it.laddr[1:] == (urlsplit(url).port,)}
    found = (transport_of(each) for each in listeners if each is not None)
    return next(filter(None, found), "")


async def _prove(
    prefill: SeenEngine, decode: SeenEngine, apis: Mapping[str, EngineApi], *, is_exact: bool
) -> SeenPair:
    names = (engine.label or engine.url for engine in (prefill, decode))
    pair = SeenPair(prefill.url, decode.url, " -> ".join(names))
    common = [name for name in prefill.models if name in decode.models]
    if not common:
        return replace(pair, problem="they serve no model of the same name")
    try:
        proof = await send_canary(apis[prefill.url], apis[decode.url], common[0], is_exact=is_exact)
    except PdlaunchError as error:
        pair = replace(pair, problem=str(error))
        params = error.params if isinstance(error, CanaryDied) else {}
    else:
        # UCX prints the transport at the first READ, so it is read after the canary.
        pair = replace(pair, transport=_transport(decode.url), seconds=round(proof.seconds, 3))
        pair = replace(pair, num_bytes=proof.num_bytes, is_reported=proof.is_reported)
        params = proof.params
    host = params.get("remote_host") if prefill.kind == "vllm" else None
    return replace(pair, wrong_address=_wrong_address(host, pair))


def _wrong_address(host: object, pair: SeenPair) -> str:
    """Return why decode cannot reach the side channel at prefill's host, or an empty string."""
    if not isinstance(host, str):
        return ""
    if host in WILDCARDS:
        return f"it sends decode to {host}, which is decode's own host"
    urls = (pair.prefill, pair.decode)
    prefill, decode = ("localhost" if is_here(it) else urlsplit(it).hostname or "" for it in urls)
    if is_loopback(host) and prefill != decode:
        return f"it sends decode on {decode} to {host}, which is decode's own host"
    return ""
