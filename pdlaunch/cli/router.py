"""``pdlaunch router`` runs only a router, for engines that run already."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from pdlaunch.cli.flags import with_router_flags
from pdlaunch.cli.options import BothOption, DecodeOption, KeyEnvOption, PrefillOption, StopOption
from pdlaunch.cli.output import ending_at_errors
from pdlaunch.cli.steady_output import standard_input, steady_output
from pdlaunch.config.sources import load_config
from pdlaunch.errors import ConfigError, ProtocolError
from pdlaunch.http.engine_calls import EngineApi
from pdlaunch.launch.bootstraps import router_spec
from pdlaunch.launch.engines import capabilities_over_http
from pdlaunch.machine.network import listening
from pdlaunch.observe.logs import setup_logging
from pdlaunch.protocol.certificates import CertificateFiles
from pdlaunch.protocol.process.bootstrap import raise_open_files
from pdlaunch.protocol.process.run_dirs import new_run_dir
from pdlaunch.router.main import run_alone
from pdlaunch.router.membership import Member, WatchSettings, read_engines_file, to_member

ASK_TIMEOUT_S = 5.0


@with_router_flags
def router(
    config: Path | None = None,
    prefill: PrefillOption = None,
    decode: DecodeOption = None,
    both: BothOption = None,
    engine_key_env: KeyEnvOption = None,
    stop_on_stdin_eof: StopOption = False,
    *,
    flags: dict[str, object],
) -> None:
    """Route requests to running engines, native or of vLLM.

    The router watches each engine over HTTP and proves pairs with canaries. It never starts,
    restarts or stops an engine.
    """
    with steady_output(), ending_at_errors():
        if "model" in flags:
            why = f"{flags['model']} is not a deployment file (.yaml, .yml or .json)"
            raise ConfigError(why, fix="name a file; engines have their models already")
        by_role = {"prefill": prefill, "decode": decode, "both": both}
        named = [(role, url) for role, urls in by_role.items() for url in urls or ()]
        if named:
            key = {"api_key_env": engine_key_env}
            flags["engines"] = [{"role": role, "url": url, **key} for role, url in named]
        loaded = load_config(config, os.environ, flags).config
        if files := CertificateFiles.given(loaded.ssl_certfile, loaded.ssl_keyfile):
            files.context()
        if loaded.engines_file is not None:
            read_engines_file(Path(loaded.engines_file))
        members = [to_member(engine, os.environ) for engine in loaded.engines]
        model = loaded.served_model_name or asyncio.run(_ask_for_model(members))
        lifeline = standard_input() if stop_on_stdin_eof else None
        raise_open_files()
        setup_logging("router", loaded.log_level, form=loaded.log_format)
        watch = WatchSettings(
            served_model_name=model,
            capabilities=capabilities_over_http("vllm" if loaded.engine == "vllm" else "native"),
            is_exact=loaded.dtype == "float32",
        )
        with listening(loaded.host, loaded.port) as listeners, new_run_dir() as folder:
            spec = router_spec(loaded, model, listeners)
            for listener in listeners:
                listener.detach()  # the router closes them
            file = None if loaded.engines_file is None else Path(loaded.engines_file)
            asyncio.run(_serve(lifeline, partial(run_alone, spec, watch, members, file, folder)))


async def _ask_for_model(members: Sequence[Member]) -> str:
    """Return the model of the first engine that answers with one model. Raises ConfigError."""
    reasons = []
    for member in members:
        api = EngineApi(member.url, member.key)
        try:
            models = list(await api.models(ASK_TIMEOUT_S))
        except ProtocolError as error:
            reasons.append(f"{member.name}: {error}")
            continue
        finally:
            await api.close()
        # If an engine serves several models, the router cannot choose one.
        if len(models) == 1:
            return models[0]
        reasons.append(f"{member.name} serves {', '.join(models) or 'no model'}")
    told = "; ".join(reasons) or "no engine is named by its URL"
    why = f"no engine reports which model it serves ({told})"
    fix = "name the model with --served-model-name, or start the engines first"
    raise ConfigError(why, field="served_model_name", fix=fix)


async def _serve(
    lifeline: int | None, run: Callable[[asyncio.Queue[None]], Awaitable[None]]
) -> None:
    loop, signals = asyncio.get_running_loop(), asyncio.Queue[None]()
    if lifeline is not None:

        def read() -> None:
            if not os.read(lifeline, 4096):
                loop.remove_reader(lifeline)
                signals.put_nowait(None)

        loop.add_reader(lifeline, read)
    await run(signals)
    sys.stderr.flush()
