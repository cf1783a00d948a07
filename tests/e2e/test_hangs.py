"""Ranks that live and do nothing: ``SIGSTOP`` in the middle of their work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment
from pdlaunch.launch.client.smoke import engines_of
from tests.e2e.api import complete, streamed
from tests.e2e.faults import faulty_deployment, left_over, num_migrations, tracebacks
from tests.e2e.tiny_models import make_tiny_model
from tests.e2e.waiting import await_true

PROMPT = list(range(40, 100))
RANKS = ("prefill-0/rank-0", "decode-0/rank-0")


def test_stopped_ranks_are_restarted_and_their_requests_go_on(tmp_path: Path) -> None:
    """Both at once: decode while a stream is in its middle, prefill while it has a prompt. Servers
    and router hang never.
    """
    model = make_tiny_model("llama", tmp_path, max_model_len=2048)
    with faulty_deployment(
        model, None, "--kv-cache-memory", "4MiB", environ={"PDLAUNCH_HANG_TIMEOUT_S": "5"}
    ) as deployment:
        processes, migrations = deployment.processes(), num_migrations(deployment)
        with ThreadPoolExecutor(1) as pool:
            with streamed(deployment.url, PROMPT, 1500) as token_ids:
                # Its end is seconds away now.
                found = list(islice(token_ids, 5))
                for name in RANKS:
                    processes[name].suspend()
                request = pool.submit(complete, deployment.url, PROMPT, 16, cache_salt="new")
                while num_migrations(deployment) == migrations:
                    found.append(next(token_ids))
                found += islice(token_ids, 50)
            answer = request.result()
        await_true(
            lambda: states(deployment) == {"prefill-0": "ready", "decode-0": "ready"},
            "both engines are back",
        )
        expected = complete(deployment.url, PROMPT, len(found), cache_salt="reference")
        assert (found, answer) == (expected, expected[:16])
        assert left_over(deployment) == []
        restarted = {
            name
            for name, process in deployment.processes().items()
            if process.pid != processes[name].pid
        }
        assert restarted == set(RANKS)
        assert all(f"{name} hung" in deployment.output() for name in RANKS)
        ends = Api(deployment.url).metrics()["pdlaunch_process_ends_total"]
        assert ends == len(RANKS), "no server and no router"
        assert tracebacks(deployment) == {}


def states(deployment: Deployment) -> dict[str, str]:
    return {engine["name"]: engine["state"] for engine in engines_of(Api(deployment.url))}
