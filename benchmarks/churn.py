"""Restarts engines and changes their number under load: ``python -m benchmarks.churn``.

Every answer is compared with the answer of the bare model. Descriptors, files, processes and memory
of supervisor and router are counted before and after.
"""

# ruff: noqa: T201 - a script
from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import own_launches
from tests.e2e.api import complete, idle
from tests.e2e.client import Deployment, admin_api
from tests.e2e.conftest import launched
from tests.e2e.tiny_models import greedy, make_tiny_model

NUM_TOKENS = 16
PROMPTS = [list(range(40 + index, 100 + index)) for index in range(4)]
ENGINES = ("decode-0", "decode-1", "prefill-0")


def counted(deployment: Deployment) -> dict[str, int]:
    (launch,) = own_launches(deployment.url)
    processes = deployment.processes()
    found = {"files": len(list(launch.run_dir.rglob("*"))), "processes": len(processes)}
    for name, process in (
        ("supervisor", psutil.Process(deployment.process.pid)),
        ("router", processes["router"]),
    ):
        found[f"{name} descriptors"] = process.num_fds()
        found[f"{name} MiB"] = process.memory_info().rss >> 20
    return found


def run(deployment: Deployment, *arguments: str) -> None:
    command = [sys.executable, "-m", "pdlaunch", *arguments, "--url", deployment.url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{arguments}: {done.returncode}: {(done.stdout + done.stderr)[-300:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--restarts", type=int, default=30)
    parser.add_argument("--changes", type=int, default=20)
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    ends = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model("llama", Path(folder))
        expected = greedy(model, PROMPTS, NUM_TOKENS)
        with launched(model, "--decode", "2") as deployment:

            def ask(index: int) -> None:
                number = 0
                while not ends.is_set():
                    number += 1
                    salt = f"{index}-{number}"
                    try:
                        told = complete(deployment.url, PROMPTS[index], NUM_TOKENS, cache_salt=salt)
                        outcomes["equal" if told == expected[index] else "wrong"] += 1
                    except (PdlaunchError, AssertionError) as error:
                        outcomes[str(error)[:150]] += 1
                    time.sleep(0.05)

            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                for index in range(len(PROMPTS)):
                    pool.submit(ask, index)
                time.sleep(3.0)
                before = counted(deployment)
                for number in range(options.restarts):
                    run(deployment, "restart", ENGINES[number % len(ENGINES)])
                for number in range(options.changes):
                    run(deployment, "scale", f"decode={2 + (number + 1) % 2}")
                ends.set()
            while not idle(deployment.url):
                time.sleep(0.2)
            _, status = admin_api(deployment.url).get_object("/pdlaunch/status")
            print("before", before)
            print("after ", counted(deployment))
            print(f"errors {status['errors']}, answers {dict(outcomes)}")


if __name__ == "__main__":
    main()
