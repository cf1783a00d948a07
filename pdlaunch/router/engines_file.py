"""Watches ``engines_file``, which lists the engines of a router that runs alone."""

import asyncio
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pdlaunch.config.external import RunningEngine, RunningEngines, named
from pdlaunch.config.problems import InvalidConfigError
from pdlaunch.config.yaml_file import read_yaml
from pdlaunch.errors import ConfigError, RequestError
from pdlaunch.router.membership import Member, WatchedMembership

_logger = logging.getLogger(__name__)

POLL_S = 2.0
FILE = "file"

_engines: TypeAdapter[tuple[RunningEngine, ...]] = TypeAdapter(RunningEngines)


def to_member(engine: RunningEngine, environ: Mapping[str, str]) -> Member:
    """Return the member to watch, with its key. Raises ConfigError if the variable is not set."""
    key = None
    if engine.api_key_env is not None and not (key := environ.get(engine.api_key_env)):
        raise ConfigError(
            f"the key of {engine.name} is missing: {engine.api_key_env} is not set, or empty",
            field="engines",
            value=engine.api_key_env,
            fix=f"set the variable {engine.api_key_env}, or leave api_key_env out",
        )
    assert engine.name is not None
    return Member(engine.name, engine.role, engine.url, key)


async def follow(
    path: Path, membership: WatchedMembership, drain_timeout_s: float, *, poll_s: float = POLL_S
) -> None:
    """Poll the file until cancelled. While the file is invalid, its engines do not change."""
    latest: list[Member] = []
    complaint = ""
    while True:
        try:
            engines = await asyncio.to_thread(read_engines_file, path)
            members = [to_member(engine, os.environ) for engine in engines]
            if members != latest:
                latest = members
                await _set_members(membership, members, drain_timeout_s)
            complaint = ""
        except (ConfigError, OSError) as error:
            if str(error) != complaint:
                _logger.error("%s; the engines stay as they are", error)
            complaint = str(error)
        await asyncio.sleep(poll_s)


async def _set_members(
    membership: WatchedMembership, members: Iterable[Member], drain_timeout_s: float
) -> None:
    """Drain and remove the file's engines that are not in ``members``, and add new ones."""
    wanted = {member.name: member for member in members}
    there = membership.members(FILE)
    gone = [name for name in there if there[name] != wanted.get(name)]
    new = [wanted[name] for name in wanted if name not in there or name in gone]
    # A new engine waits for a removed one only if both have the same name or URL.
    waiting = [member for member in new if membership.holder(member) is not None]

    def add(added: Iterable[Member]) -> None:
        for member in added:
            try:
                membership.add(member, FILE)
            except RequestError as error:
                _logger.error("%s is left out: %s", member.name, error)

    add(member for member in new if member not in waiting)
    await asyncio.gather(*(membership.remove(name, drain_timeout_s) for name in gone))
    add(waiting)


def read_engines_file(path: Path) -> list[RunningEngine]:
    """Return the engines that a file lists under ``engines``. Raises ConfigError."""
    # Messages show no values of the file: a value may be a secret in the wrong place.
    values, _, problems = read_yaml(path)
    if problems:
        raise InvalidConfigError(problems)
    if set(values) != {"engines"} or not isinstance(engines := values["engines"], list):
        raise _unusable(path, "it must hold `engines: [{role, url, ...}]` and nothing else")
    try:
        return named(_engines.validate_python(tuple(engines)))
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        reason = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in details)
    except ValueError as error:
        reason = str(error)
    raise _unusable(path, reason)


def _unusable(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{path} cannot be used: {reason}",
        field="engines_file",
        value=str(path),
        fix="write `engines: [{role: prefill, url: http://HOST:PORT}]`",
    )
