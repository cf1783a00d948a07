"""``python -m pdlaunch.bench step|offload|transfer JSON``: run one benchmark in this process and
print its figures as JSON.

The command line starts it (``pdlaunch bench``), so that torch and thread pools of the wanted size
live in a process of their own. JSON is an object with the arguments of ``bench_step``,
``bench_offload`` or ``bench_transfer``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pdlaunch.errors import ConfigError, PdlaunchError


def main() -> None:
    """Print the figures; an error that a user can act on is one line, and its fix another."""
    kind, arguments = sys.argv[1:]
    try:
        figures = _measure(kind, json.loads(arguments))
    except PdlaunchError as error:
        fix = f"\nfix: {error.fix}" if isinstance(error, ConfigError) and error.fix else ""
        sys.exit(f"error: {error}{fix}")
    sys.stdout.write(json.dumps(figures) + "\n")


def _measure(kind: str, arguments: dict[str, Any]) -> object:
    # Each import takes seconds and memory: only that of the benchmark that runs.
    match kind:
        case "step":
            from pdlaunch.bench.step.timing import bench_step, row_figures

            return [row_figures(timing) for timing in bench_step(**arguments)]
        case "offload":
            import torch

            from pdlaunch.bench.offload.copies import bench_offload, report_figures

            # Each direction has one thread of the handler; the contiguous limit gets no more.
            torch.set_num_threads(1)
            return report_figures(bench_offload(**arguments))
        case "transfer":
            from dataclasses import asdict

            from pdlaunch.bench.transfer.pulls import bench_transfer

            if "tp_pairs" in arguments:
                arguments["tp_pairs"] = [tuple(pair) for pair in arguments["tp_pairs"]]
            return [asdict(row) for row in bench_transfer(**arguments)]
        case _:
            raise PdlaunchError(f"there is no benchmark {kind}: choose step, offload or transfer")


if __name__ == "__main__":
    main()
