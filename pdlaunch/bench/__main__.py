"""``python -m pdlaunch.bench JSON``: runs ``pdlaunch bench transfer`` in a process of its own, as
torch and its thread pools stay out of commands. Prints rows of JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from pdlaunch.bench.transfer.pulls import bench_transfer
from pdlaunch.errors import ConfigError, PdlaunchError


def main() -> None:
    """Take the arguments of ``bench_transfer`` as a JSON object."""
    arguments = json.loads(sys.argv[1])
    if "tp_pairs" in arguments:
        arguments["tp_pairs"] = [tuple(pair) for pair in arguments["tp_pairs"]]
    try:
        rows = bench_transfer(**arguments)
    except PdlaunchError as error:
        fix = f"\nfix: {error.fix}" if isinstance(error, ConfigError) and error.fix else ""
        sys.exit(f"error: {error}{fix}")
    sys.stdout.write(json.dumps([asdict(row) for row in rows]) + "\n")


if __name__ == "__main__":
    main()
