"""``pdlaunch doctor``: judge a deployment of vLLM that somebody else started."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from pdlaunch.checks.context import Probes
from pdlaunch.checks.deployment import SeenDeployment, SeenEngine, SeenPair
from pdlaunch.checks.registry import all_rules
from pdlaunch.checks.run import Report, run_checks
from pdlaunch.cli.check_config import Format, print_report, refuse_input
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import Role
from pdlaunch.engines.kind import OF_RUNNING_ENGINES
from pdlaunch.errors import ConfigError, PdlaunchError, ProtocolError
from pdlaunch.platform.facts import Machine
from pdlaunch.resolve.models import Model
from pdlaunch.resolve.resolve import THIS_HOST, resolve
from pdlaunch.watch.canary import BYTES_READ, SECONDS_READ, send_canary
from pdlaunch.watch.engine_api import Counts, EngineApi

ASK_TIMEOUT_S = 10.0
MEASURABLE_BYTES = 64 * 1024**2
"""Of fewer bytes the time is that of starting their READs."""
_FAILED = ("vllm:nixl_num_failed_transfers_total", "vllm:nixl_num_failed_notifications_total")


def doctor(
    routers: Annotated[
        list[str] | None,
        typer.Argument(metavar="[URL]...", help="A router of pdlaunch, which names its engines."),
    ] = None,
    prefill: Annotated[
        list[str] | None,
        typer.Option("--prefill", metavar="URL", help="A prefill engine. Repeats."),
    ] = None,
    decode: Annotated[
        list[str] | None,
        typer.Option("--decode", metavar="URL", help="A decode engine. Repeats."),
    ] = None,
    engine_key_env: Annotated[
        str | None,
        typer.Option(
            "--engine-key-env", metavar="NAME", help="Variable with the key of the engines."
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="A canary's tokens must be equal, as they are in float32."),
    ] = False,
    canary: Annotated[
        bool, typer.Option(help="Send a short prompt through each pair of engines.")
    ] = True,
    output: Annotated[Format, typer.Option("--format", help="How findings are printed.")] = "table",
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")] = False,
) -> None:
    """Find what is wrong with engines of vLLM that run already, and harm nothing.

    Each engine is asked for its health, version, models and metrics; through each pair goes one
    prompt of two KV blocks with at most 4 tokens out. The side channel is not touched.
    """
    try:
        key = _key(engine_key_env, os.environ)
        for name, given in (("URL", routers), ("--prefill", prefill), ("--decode", decode)):
            for url in given or ():
                _require_url(name, url)
        listed = asyncio.run(_engines_of(routers or ()))
        named: list[tuple[Role, str]] = [
            *(("prefill", url) for url in prefill or ()),
            *(("decode", url) for url in decode or ()),
        ]
        urls = list(dict.fromkeys([*named, *listed]))
        if not urls:
            raise ConfigError(
                "no engine is named",
                fix="give the URL of a router of pdlaunch, or --prefill URL --decode URL",
            )
    except ConfigError as error:
        refuse_input(error, output, None)
    seen = asyncio.run(examine(urls, key, sends_canaries=canary, is_exact=exact))
    print_report(judge(seen), output, strict=strict)


async def _engines_of(routers: Sequence[str]) -> list[tuple[Role, str]]:
    """Return the engines that routers list. Raises ConfigError where they are not of vLLM."""
    found: list[tuple[Role, str]] = []
    for url in routers:
        # Without the key, which is for engines.
        api = EngineApi(url)
        try:
            engines = await api.listed_engines(ASK_TIMEOUT_S)
        except ProtocolError as error:
            raise ConfigError(
                f"not a router of pdlaunch: {error}",
                field="URL",
                value=url,
                fix="name engines by --prefill and --decode: vLLM does not tell its role",
            ) from None
        finally:
            await api.close()
        for role, engine, kind in engines:
            if kind != "vllm":
                raise ConfigError(
                    f"its engine {engine} is {kind}: pdlaunch proves its own pairs by itself",
                    field="URL",
                    value=url,
                    fix="name engines of vLLM",
                )
            if role in ("prefill", "decode"):
                found.append(("prefill" if role == "prefill" else "decode", engine))
    return found


def judge(seen: SeenDeployment) -> Report:
    """Apply the rules on engines that run already."""
    config = LaunchConfig.model_validate({"engine": "vllm"})
    unknown = Model("unknown", None, None, pending="engines that run already do not tell")
    roles: tuple[Role, ...] = ("prefill", "decode")
    launch = resolve(config, {THIS_HOST: Machine()}, {}, dict.fromkeys(roles, unknown))
    rules = [rule for rule in all_rules().values() if rule.code in OF_RUNNING_ENGINES]
    report = run_checks(launch, {}, Probes(deployment=seen), rules=rules)
    return replace(report, resolved={"deployment": asdict(seen)})


async def examine(
    urls: list[tuple[Role, str]], key: str | None, *, sends_canaries: bool, is_exact: bool
) -> SeenDeployment:
    """Look at engines, all at the same time, then send a canary through each pair in turn."""
    apis = {url: EngineApi(url, key) for _, url in urls}
    try:
        engines = await asyncio.gather(*(_look(role, url, apis[url]) for role, url in urls))
        seen = SeenDeployment(tuple(engines), None)
        if not sends_canaries:
            return seen
        pairs = [
            await _prove(prefill, decode, apis, is_exact=is_exact)
            for prefill in seen.of("prefill")
            for decode in seen.of("decode")
        ]
        return replace(seen, pairs=tuple(pairs))
    finally:
        for api in apis.values():
            await api.close()


async def _look(role: Role, url: str, api: EngineApi) -> SeenEngine:
    if (healthy := await api.is_healthy(ASK_TIMEOUT_S)) is not True:
        said = "does not answer" if healthy is None else "is not healthy"
        return SeenEngine(role, url, problem=f"it {said}: GET /health")
    try:
        version = await api.version(ASK_TIMEOUT_S)
        models = await api.models(ASK_TIMEOUT_S)
        counts = await api.counts(ASK_TIMEOUT_S)
    except ProtocolError as error:
        return SeenEngine(role, url, problem=str(error))
    info = await api.server_info(ASK_TIMEOUT_S)
    lengths = [length for length in models.values() if length is not None]
    cache = "vllm:cache_config_info"
    num_bytes = int(counts.total(BYTES_READ["vllm"]))
    return SeenEngine(
        role,
        url,
        version=version,
        models=tuple(models),
        max_model_len=min(lengths, default=None),
        block_size=counts.label(cache, "block_size"),
        cache_dtype=counts.label(cache, "cache_dtype"),
        prompt_tokens=int(counts.total("vllm:prompt_tokens_total")),
        bytes_read=num_bytes,
        gigabytes_per_s=_speed(counts, num_bytes),
        num_expired=int(counts.total("vllm:nixl_num_kv_expired_reqs_total")),
        num_failed=sum(int(counts.total(name)) for name in _FAILED),
        has_dev_mode=info is not None,
        **_transfer_settings(info or {}),
    )


async def _prove(
    prefill: SeenEngine, decode: SeenEngine, apis: Mapping[str, EngineApi], *, is_exact: bool
) -> SeenPair:
    common = [name for name in prefill.models if name in decode.models]
    if not common:
        return SeenPair(prefill.url, decode.url, "they serve no model of the same name")
    try:
        proof = await send_canary(apis[prefill.url], apis[decode.url], common[0], is_exact=is_exact)
    except PdlaunchError as error:
        return SeenPair(prefill.url, decode.url, str(error))
    return SeenPair(
        prefill.url, decode.url, num_bytes=proof.num_bytes, seconds=round(proof.seconds, 3)
    )


def _speed(counts: Counts, num_bytes: int) -> float | None:
    seconds = counts.total(SECONDS_READ["vllm"])
    return num_bytes / seconds / 1e9 if seconds and num_bytes >= MEASURABLE_BYTES else None


def _transfer_settings(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what /server_info tells of the connector; empty where it tells something else."""
    config = info.get("vllm_config")
    transfer = config.get("kv_transfer_config") if isinstance(config, dict) else None
    if not isinstance(transfer, dict):
        return {}
    extra = transfer.get("kv_connector_extra_config")
    lease = extra.get("kv_lease_duration", 30) if isinstance(extra, dict) else 30
    return {
        "kv_role": transfer.get("kv_role"),
        "on_failure": transfer.get("kv_load_failure_policy"),
        "lease_s": lease if isinstance(lease, int) else None,
    }


def _key(variable: str | None, environ: Mapping[str, str]) -> str | None:
    if variable is None:
        return None
    if not (key := environ.get(variable)):
        raise ConfigError(
            "the variable is not set, or empty",
            field="--engine-key-env",
            value=variable,
            fix="export it with the engines' key",
        )
    return key


def _require_url(name: str, url: str) -> None:
    if not url.startswith(("http://", "https://", "unix:/")):
        raise ConfigError(
            "not a URL",
            field=name,
            value=url,
            fix="write http://HOST:PORT, or unix:/PATH of a socket",
        )
