# ruff: noqa: T201 - a script
"""Attacks a deployment of its own: ``python -m tests.attacks`` makes all attacks, ``python -m
tests.attacks fuzz sockets`` these.

Each attack prints a short table and every promise that was broken, with the request that broke it;
the exit code is then 1. Nothing listens outside of 127.0.0.1, every loop has an end, and no
deployment but its own is touched.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pdlaunch.errors import PdlaunchError
from tests.attacks.bodies import bodies
from tests.attacks.fuzz import fuzz
from tests.attacks.kv_fuzz import kv_fuzz
from tests.attacks.sockets import sockets
from tests.attacks.target import Target, attacked
from tests.attacks.verdict import Verdict

ATTACKS: dict[str, tuple[str, Callable[..., None]]] = {
    "sockets": ("listening sockets, shared memory and files of a launch, as another user", sockets),
    "fuzz": ("every request field with extreme values, at router and engines", fuzz),
    "kvfuzz": ("kv_transfer_params, resume and ids", kv_fuzz),
    "dos": ("huge but legal bodies beside a small request", bodies),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 when a promise was broken."""
    listed = "\n".join(f"  {name:<8} {what}" for name, (what, _) in ATTACKS.items())
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
    # A short attack needs less warming up than a long one.
    num_warm = min(30, 1 + options.requests // 30)
    with tempfile.TemporaryDirectory() as folder, attacked(Path(folder), num_warm) as target:
        return max(run(name, target, options) for name in options.attacks or ATTACKS)


def run(name: str, target: Target, options: argparse.Namespace) -> int:
    """Make one attack, print its table; returns the exit code."""
    what, attack = ATTACKS[name]
    print(f"{name}: {what}", flush=True)
    start_s, verdict = time.monotonic(), Verdict(name)
    chosen = {"num_requests": options.requests, "seed": options.seed} if name == "fuzz" else {}
    try:
        attack(target, verdict, **chosen)
    except (AssertionError, PdlaunchError) as error:
        verdict.broke("the deployment outlives the attack", str(error))
    code = verdict.conclude()
    print(f"{name}: {time.monotonic() - start_s:.0f} s\n", flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
