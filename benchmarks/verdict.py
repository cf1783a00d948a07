"""Repeats ``pdlaunch verdict`` and counts how often it is right: ``python -m benchmarks.verdict``.

The requests are the same, the goals differ. In an aggregated engine, another prompt raises the TPOT
of a stream from 57 to 125 ms and breaks the tight goal, so P/D wins. With the loose goal P/D loses,
because aggregated engines compute prompts on every core. A goal for ITL does not separate them: the
hand-over makes one gap of 200 ms. One longer measurement of both arms decides which answer is
right. ``--config`` replaces the demo model's file, for example by one for vLLM; choose ``--tight``
and ``--loose`` for it.
"""

# ruff: noqa: T201 - a script
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DEMO = """\
engine: native
device: cpu
dtype: float32
kv_cache_memory: 256MiB
num_threads: 1
routing: {policy: pairs}
"""


def verdict(
    config: Path, folder: Path, options: argparse.Namespace, slo: str, **more: object
) -> Any:
    """Run ``pdlaunch verdict``; return its JSON."""
    command = [sys.executable, "-m", "pdlaunch", "verdict", str(config), "--format", "json"]
    command += ["--gpus", str(options.gpus), "--slo", slo, "--output", str(folder)]
    command += ["--input-tokens", str(options.input_tokens)]
    command += ["--output-tokens", str(options.output_tokens)]
    for name, value in more.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def goodputs(found: Any) -> dict[str, float]:
    return {row["arm"]: row["goodput"] for row in found["rows"]}


def described(row: Any) -> str:
    interval = f"{row['at_least'] or 0:.2f} to {row['at_most'] or 0:.2f}"
    goodput = f"{row['bound'].strip('-')} {row['goodput']:.2f}".strip()
    return f"{row['arm']} {goodput} ({interval}), predicted {row['predicted'] or 0:.2f}"


def spread(errors: list[float]) -> str:
    return f"{statistics.median(errors):.0f}, {max(errors):.0f}" if errors else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--truth-minutes", type=float, default=4.0)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--tight", default="ttft=5000,tpot=100")
    parser.add_argument("--loose", default="ttft=5000,tpot=1000")
    parser.add_argument("--goals", default="tight,loose", help="which of the two to measure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = options.config or folder / "demo.yaml"
        if options.config is None:
            config.write_text(DEMO)
        for goals in options.goals.split(","):
            slo = getattr(options, goals)
            truth = verdict(
                config, folder / goals, options, slo, minutes=options.truth_minutes, seed=1000
            )
            true_rates = goodputs(truth)
            print(f"{goals} ({slo}), longer: {truth['text']} {truth['note']}", flush=True)
            num_right, own_errors, true_errors, took_s = 0, [], [], []
            for seed in range(options.repeats):
                start_at = time.monotonic()
                found = verdict(
                    config,
                    folder / f"{goals}-{seed}",
                    options,
                    slo,
                    minutes=options.minutes,
                    seed=seed,
                )
                took_s.append(time.monotonic() - start_at)
                num_right += found["choice"] == truth["choice"]
                for row in found["rows"]:
                    if row["error_percent"] is not None:
                        own_errors.append(abs(row["error_percent"]))
                    if row["predicted"] is not None and row["arm"] in true_rates:
                        error = row["predicted"] / true_rates[row["arm"]] - 1
                        true_errors.append(abs(round(100 * error)))
                print(
                    f"{goals} {seed}: {found['choice']} after {took_s[-1]:.0f} s; "
                    + ", ".join(map(described, found["rows"])),
                    flush=True,
                )
            print(
                f"{goals}: right {num_right} of {options.repeats}, {statistics.mean(took_s):.0f} s "
                "each; error of predictions, median and largest, %: beside the repeat's own figure "
                f"{spread(own_errors)}; beside the longer one {spread(true_errors)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
