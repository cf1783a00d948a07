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
from tests.attacks.connections import connections
from tests.attacks.fuzz import fuzz
from tests.attacks.kv_fuzz import kv_fuzz
from tests.attacks.sockets import sockets
from tests.attacks.surroundings import surroundings
from tests.attacks.target import DeploymentLostError, Target, attacked, make_model
from tests.attacks.verdict import Verdict

NUM_REQUESTS = 10_000

ON_A_LAUNCH = ("sockets", "fuzz", "kvfuzz", "conns", "dos")
ATTACKS = {
    "sockets": "listening sockets, shared memory and files of a launch, as another user",
    "fuzz": "every request field with extreme values, at router and engines",
    "kvfuzz": "kv_transfer_params, resume and ids",
    "conns": "silent, half-spoken and vanishing connections, readers that never read",
    "dos": "huge but legal bodies beside a small request",
    "env": "bad surroundings: full disk, few descriptors, no /dev/shm",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 when a promise was broken."""
    listed = "\n".join(f"  {name:<8} {what}" for name, what in ATTACKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.attacks",
        description=f"{__doc__}\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help="all when none is named")
    parser.add_argument(
        "--requests", type=int, default=NUM_REQUESTS, help=f"of fuzz ({NUM_REQUESTS})"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--log-dir", help="where the logs of the attacked deployment stay; else they go with it"
    )
    options = parser.parse_args(arguments)
    names = options.attacks or list(ATTACKS)
    if unknown := set(names) - set(ATTACKS):
        parser.error(
            f"no such attack: {', '.join(sorted(unknown))}; there are {', '.join(ATTACKS)}"
        )
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        if chosen := [name for name in ON_A_LAUNCH if name in names]:
            # A short attack needs less warming up than a long one.
            num_warm = min(30, 1 + options.requests // 30)
            with attacked(model, num_warm=num_warm, log_dir=options.log_dir) as target:
                for name in chosen:
                    code |= run(
                        name, partial(on_launch, name, target, options.requests, options.seed)
                    )
        if "env" in names:
            code |= run("env", partial(surroundings, model))
    return code


def on_launch(name: str, target: Target, num_requests: int, seed: int, verdict: Verdict) -> None:
    """One of the attacks on a launch that serves."""
    match name:
        case "sockets":
            sockets(target, verdict)
        case "fuzz":
            fuzz(target, verdict, num_requests, seed)
        case "kvfuzz":
            kv_fuzz(target, verdict)
        case "conns":
            connections(target, verdict, seed)
        case "dos":
            bodies(target, verdict)


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
