"""Rules PD43x and PD44x judge the settings of UCX, with which NIXL moves KV blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from pdlaunch.checks.context import Context
from pdlaunch.checks.nixl_answers import NixlAnswer
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.problems import nearest, shown, shown_name
from pdlaunch.config.roles import Role
from pdlaunch.config.ucx import (
    CUDA,
    RDMA,
    known_transports,
    leaves_out_shared_memory,
    opens_network,
    setting,
    ucx_transports,
    unknown_transports,
)
from pdlaunch.config.ucx_variables import (
    KNOWN_VARIABLES,
    is_known_variable,
    network_variables,
    unknown_variables,
)
from pdlaunch.planning.role_engines import RoleEngines

_UCX = "UCX_TLS, UCX 1.19 as NIXL 1.5.1 ships it."
_BARE_NAMES = sorted(name.removeprefix("UCX_") for name in KNOWN_VARIABLES)


@rule(
    "PD430",
    "error",
    fix="Add cuda to UCX_TLS, or unset it.",
    source=_UCX,
    needs=("gpus",),
)
def ucx_without_cuda(context: Context) -> Iterator[Found]:
    """UCX_TLS leaves out the CUDA transports.

    UCX then takes GPU addresses for host memory: registration fails, or blocks go through the host.
    """
    for engine in context.peers("cuda"):
        if context.uses_ucx and not CUDA.intersection(engine.ucx_transports):
            yield Found(
                context.where_variable(engine, "UCX_TLS"),
                (f"UCX_TLS {_given(engine)} has no CUDA transport, but {engine.role} runs on GPUs"),
            )


@rule(
    "PD431",
    "warning",
    fix="Add cuda to UCX_TLS, or unset it.",
    source=_UCX,
    needs=("gpus",),
)
def ucx_without_cuda_ipc(context: Context) -> Iterator[Found]:
    """UCX_TLS leaves out cuda_ipc.

    GPUs of one host then exchange blocks through host memory instead of NVLink.
    """
    for engine in context.peers("cuda"):
        transports = engine.ucx_transports
        # PD430 speaks of UCX_TLS without any CUDA transport.
        if context.uses_ucx and "cuda_copy" in transports and "cuda_ipc" not in transports:
            yield Found(
                context.where_variable(engine, "UCX_TLS"),
                f"UCX_TLS {_given(engine)} has no cuda_ipc",
            )


@rule(
    "PD432",
    "warning",
    fix="Add cma to UCX_TLS, or unset it.",
    source=(
        "NIXL 1.5.1, measured: without CMA a READ needs the prefill rank's process, and never ends "
        "when that dies meanwhile."
    ),
)
def ucx_without_cma(context: Context) -> Iterator[Found]:
    """UCX_TLS leaves out CMA between processes of one host.

    The prefill rank then copies its blocks into shared memory, piece by piece, and the decode rank
    out of it again.
    """
    for engine in context.peers("cpu"):
        transports = engine.ucx_transports
        # Without posix nothing connects two processes at all: PD433.
        if context.uses_ucx and "posix" in transports and "cma" not in transports:
            yield Found(
                context.where_variable(engine, "UCX_TLS"),
                f"UCX_TLS {_given(engine)} has no cma",
            )


@rule(
    "PD433",
    "error",
    fix="Unset UCX_TLS, or UCX_SHM_DEVICES.",
    source=_UCX,
)
def ucx_without_path(context: Context) -> Iterator[Found]:
    """UCX_TLS or UCX_SHM_DEVICES leaves no transport between processes of one host.

    All ranks are on this host, so pdlaunch leaves out whatever would listen on the network without
    authentication (tcp, RDMA) or open memory to other users (sysv, knem). posix has to be there:
    UCX finds its peers through it.
    """
    for engine in context.peers():
        if context.uses_ucx and "posix" not in engine.ucx_transports:
            yield Found(
                context.where_variable(engine, "UCX_TLS"),
                (
                    f"UCX_TLS {_given(engine)} leaves nothing that connects two processes "
                    "of this host; posix is missing"
                ),
            )
        elif context.uses_ucx and leaves_out_shared_memory(engine.given_environ):
            yield Found(
                context.where_variable(engine, "UCX_SHM_DEVICES"),
                (
                    f"UCX_SHM_DEVICES {shown(engine.given_environ['UCX_SHM_DEVICES'])} leaves out "
                    "memory, the device of posix and cma: nothing connects two processes"
                ),
            )


@rule(
    "PD434",
    "warning",
    fix="Add rc (or ib) to UCX_TLS, or unset it.",
    source=_UCX,
    needs=("rdma",),
    on_vllm=True,
)
def ucx_without_rdma(context: Context) -> Iterator[Found]:
    """UCX_TLS leaves out RDMA between hosts that have it.

    Blocks between hosts then go through TCP.
    """
    for engine in context.engines.values() if context.moves_over_ucx else ():
        there = engine.machine.rdma_devices
        if there and engine.has_far_peers and lacks_rdma(engine.given_environ):
            devices = ", ".join(there[:4])
            yield Found(
                context.where_variable(engine, "UCX_TLS"),
                f"UCX_TLS {_given(engine)} has no RDMA transport; this host has {devices}",
            )


@rule(
    "PD441",
    "warning",
    fix="Correct the name, or remove it from UCX_TLS.",
    source="The transports of UCX 1.19, as NIXL 1.5.1 ships it; names are told apart by case.",
)
def unknown_transport(context: Context) -> Iterator[Found]:
    """UCX_TLS names a transport that UCX does not know.

    UCX goes on without it: the transport that was meant is missing, or is used although it was to
    be left out.
    """
    for engine in context.peers() if context.uses_ucx else ():
        for name in unknown_transports(engine.given_environ):
            message = f"UCX knows no transport {shown_name(name)}"
            yield Found(
                context.where_variable(engine, "UCX_TLS"),
                message,
                _did_you_mean(nearest(name, sorted(known_transports()))),
            )


@rule(
    "PD442",
    "warning",
    fix="Correct the name, or unset the variable.",
    source="The variables of UCX 1.19, as NIXL 1.5.1 ships it.",
)
def unknown_variable(context: Context) -> Iterator[Found]:
    """A variable of UCX is misspelt.

    UCX does not look at it, and says so only on a terminal. Names that resemble none of UCX's are
    left alone, because other programs use them. With --probe UCX itself judges those of the
    transports in use.
    """
    for engine in context.peers() if context.uses_ucx else ():
        for name, meant in _misspelt(context, engine):
            message = f"UCX has no variable {shown_name(name)}"
            yield Found(context.where_variable(engine, name), message, _did_you_mean(meant))


@rule(
    "PD443",
    "info",
    fix="Nothing to fix; unset them if you expect them to matter.",
    source="Ranks of one host are given posix, cma and self; on GPUs cuda_ipc and cuda_copy too.",
)
def network_without_effect(context: Context) -> Iterator[Found]:
    """Variables for UCX's network have no effect.

    All ranks are on this host, or the network between hosts is not trusted, and pdlaunch leaves
    them no transport that uses a network: devices that do not exist do no harm either.
    """
    for engine in context.peers() if context.uses_ucx else ():
        if opens_network(engine.environment):
            continue
        for name in network_variables(engine.given_environ):
            value = shown(engine.given_environ[name])
            yield Found(context.where_variable(engine, name), f"{name} {value} has no effect")


@rule(
    "PD440",
    "error",
    fix="Correct the variable that the finding names, or unset it.",
    source="A NIXL backend, made in a process of its own with the ranks' environment.",
    needs=("nixl",),
)
def ucx_refuses(context: Context) -> Iterator[Found]:
    """UCX refuses the settings of a rank.

    NIXL says NIXL_ERR_BACKEND then, and the launch ends once its ranks have started. UCX knows
    hundreds of variables and reads each by rules of its own, so it is asked itself.
    """
    for role, answer in _answers(context):
        if answer.refusal is not None:
            engine = context.engines[role]
            name = _named_in(answer.refusal, engine.given_environ)
            where = context.where_variable(engine, name) if name else "environment UCX_*"
            yield Found(where, f"NIXL cannot make its backend: {answer.refusal}")


@rule(
    "PD444",
    "warning",
    fix=(
        "Correct UCX_MODULES and the UCX_..._DEVICES, or unset them; give the container what the "
        "transport needs (cma: ptrace, cuda_ipc: the CUDA driver)."
    ),
    source="What UCX writes when a NIXL backend is made with the ranks' environment.",
    needs=("nixl",),
)
def ucx_misses(context: Context) -> Iterator[Found]:
    """UCX does not find a transport or device that a rank is to use.

    It goes on without: blocks take a slower way, or none.
    """
    for role, answer in _answers(context):
        engine = context.engines[role]
        for text in answer.unavailable:
            # Ranks of one host use no network: PD443. A rank on the CPU of a host with GPUs is
            # given CUDA's transports for NIXL's sake, and needs none.
            needless = engine.device == "cpu" and _named_transports(text) <= CUDA
            if not text.startswith("network device") and not needless:
                name = _variable_of(text)
                yield Found(context.where_variable(engine, name), f"UCX says: {text}")


def _misspelt(context: Context, engine: RoleEngines) -> Iterator[tuple[str, str]]:
    """Return the user's variables that UCX does not have, and what was meant."""
    for name in unknown_variables(engine.given_environ):
        meant = nearest(name.removeprefix("UCX_"), _BARE_NAMES)
        if meant is not None:
            yield name, f"UCX_{meant}"
    answer = (context.probes.nixl or {}).get(engine.role, NixlAnswer())
    prefixes = tuple(f"UCX_{name.upper()}_" for name in engine.ucx_transports)
    for name, likely in answer.unused.items():
        # UCX knows nothing of the variables of transports that it has not loaded.
        if likely is not None and name in engine.given_environ and name.startswith(prefixes):
            yield name, likely


def _answers(context: Context) -> Iterator[tuple[Role, NixlAnswer]]:
    if context.uses_ucx:
        yield from (context.probes.nixl or {}).items()


def _named_in(text: str, environ: Mapping[str, str]) -> str | None:
    """Return the user's variable that UCX complains of: it names RNDV_THRESH, or BW of CMA_BW."""
    given = [name for name in environ if is_known_variable(name)]
    words = set(re.findall(r"[A-Z][A-Z0-9_]+", text))
    found = [name for name in given if name.removeprefix("UCX_") in words]
    found += [name for name in given if any(name.endswith(f"_{word}") for word in words)]
    return next(iter(found or (given if len(given) == 1 else ())), None)


def _variable_of(text: str) -> str:
    """Return the variable that decides on what UCX does not find."""
    kinds = {"intra-node": "UCX_SHM_DEVICES", "loopback": "UCX_SELF_DEVICES"}
    kinds |= {"accelerator": "UCX_ACC_DEVICES"}
    return kinds.get(text.partition(" ")[0], "UCX_TLS")


def _named_transports(text: str) -> frozenset[str]:
    """Return what ``transports 'cuda_ipc','cuda_copy' are not available`` names."""
    return frozenset(re.findall(r"'(\w+)'", text)) or frozenset({text})


def lacks_rdma(environ: Mapping[str, str]) -> bool:
    """Return whether UCX_TLS, as the user wrote it, leaves out every RDMA transport.

    What ranks of one host get of it is narrowed to transports within a host.
    """
    return not ucx_transports(environ) & RDMA


def _did_you_mean(name: str | None) -> str | None:
    return None if name is None else f"did you mean {name}?"


def _given(engine: RoleEngines) -> str:
    """Return the user's UCX_TLS, for messages."""
    return setting(engine.given_environ)
