# ruff: noqa: T201 - a script
"""Attacks a deployment of its own: ``python -m tests.attacks`` makes all attacks, ``python -m
tests.attacks fuzz sockets`` these.

Each attack prints a short table and every promise that was broken, with the request that broke it;
the exit code is then 1. Nothing listens outside of 127.0.0.1, every loop has an end, and no
deployment but its own is touched.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pdlaunch.errors import PdlaunchError
from tests.attacks.bodies import bodies
from tests.attacks.fuzz import fuzz
from tests.attacks.kv_fuzz import kv_fuzz
from tests.attacks.sockets import sockets
from tests.attacks.target import DeploymentLostError, Target, attacked, make_model
from tests.attacks.verdict import Verdict

ATTACKS = {
    "sockets": "listening sockets, shared memory and files of a launch, as another user",
    "fuzz": "every request field with extreme values, at router and engines",
    "kvfuzz": "kv_transfer_params, resume and ids",
    "dos": "huge but legal bodies beside a small request",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 when a promise was broken."""
    listed = "\n".join(f"  {name:<8} {what}" for name, what in ATTACKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.attacks",
        description=f"{__doc__}\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # argparse looks for the default among the choices too.
    known = [*ATTACKS, []]
    parser.add_argument("attacks", nargs="*", choices=known, help="all when none is named")
    parser.add_argument("--requests", type=int, default=10_000, help="of fuzz")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    attacks: dict[str, Callable[[Target, Verdict], None]] = {
        "sockets": sockets,
        "fuzz": partial(fuzz, num_requests=options.requests, seed=options.seed),
        "kvfuzz": kv_fuzz,
        "dos": bodies,
    }
    # A short attack needs less warming up than a long one.
    num_warm = min(30, 1 + options.requests // 30)
    with (
        tempfile.TemporaryDirectory() as folder,
        attacked(make_model(Path(folder)), num_warm=num_warm) as target,
    ):
        codes = [run(name, partial(attacks[name], target)) for name in options.attacks or ATTACKS]
    return max(codes)


def run(name: str, attack: Callable[[Verdict], None]) -> int:
    """Make one attack, print its table; returns the exit code."""
    print(f"{name}: {ATTACKS[name]}", flush=True)
    start_s, verdict = time.monotonic(), Verdict(name)
    try:
        attack(verdict)
    except (DeploymentLostError, PdlaunchError) as error:
        verdict.broke("the deployment outlives the attack", str(error))
    code = verdict.conclude()
    print(f"{name}: {time.monotonic() - start_s:.0f} s\n", flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
