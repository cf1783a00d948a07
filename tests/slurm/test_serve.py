"""Launches in allocations of Slurm: they answer, and what runs when Slurm ends them is finished."""

import json
import shlex
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.tiny_models import TWO_HEADS, make_tiny_model
from tests.netns.hosts import ROOT
from tests.netns.launch import ANSWER, stand_in
from tests.netns.launch import QUESTION as STAND_IN_QUESTION
from tests.slurm.cluster import PORT, TIMEOUT_S, Cluster

NUM_TOKENS = 300
FILE = "deployment.yaml"
TWO_TASKS = ("--nodes=2", "--ntasks-per-node=1")
ONE_TASK = ("--nodes=1", "--ntasks=1")
SPREAD = {"prefill-0": "local", "decode-0": "n2"}
SERVE = ("pdlaunch", "serve", FILE, "--placement", "slurm", "--port", str(PORT))
QUESTION = {
    "prompt": [7] * 70,
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
    "return_token_ids": True,
}


@pytest.fixture(scope="module", autouse=True)
def deployment(cluster: Cluster) -> None:
    make_tiny_model("llama", cluster.folder, max_model_len=NUM_TOKENS + 100)
    settings = {
        "model": str(cluster.folder / "llama"),
        "device": "cpu",
        "dtype": "float32",
        "kv_cache_memory": "64MiB",
        "placement_strategy": "spread",
        "kv_transfer": {"trusted_network": True},
        "log_dir": str(cluster.folder / "logs"),
        "drain_timeout_s": 25,
    }
    (cluster.folder / FILE).write_text(json.dumps(settings))


@pytest.fixture(autouse=True)
def cancelled(cluster: Cluster) -> Iterator[None]:
    yield
    if jobs := cluster.jobs():
        cluster.run("scancel", "--full", *jobs)
        cluster.until(lambda: not cluster.jobs())


def ask(cluster: Cluster, meanwhile: Callable[[], object] = lambda: None) -> list[int] | None:
    """Ask for a long answer; None: nobody takes questions any more.

    ``meanwhile`` is called once it has begun. An answer that has begun must come to its end.
    """
    words = ("--silent", "--no-buffer", "--json", json.dumps(QUESTION))
    command = cluster.command("curl", *words, f"http://127.0.0.1:{PORT}/v1/completions")
    tokens: list[int] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        for line in asking.stdout:
            chunk = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
            assert "error" not in chunk, f"{chunk}\n{cluster.output()}"
            if chunk and not tokens:
                meanwhile()
            tokens += chunk["choices"][0]["token_ids"] if chunk else []
    assert len(tokens) in (0, NUM_TOKENS), cluster.output()
    return tokens or None


def ask_until_its_end(cluster: Cluster) -> None:
    right = ask(cluster)
    assert right is not None, cluster.output()
    while (found := ask(cluster)) is not None:
        assert found == right


def limit(cluster: Cluster, minutes: int) -> None:
    for job in cluster.jobs():
        cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


def await_end(cluster: Cluster) -> None:
    cluster.until(lambda: not cluster.jobs())
    cluster.until(lambda: not cluster.stranded())
    assert not list(cluster.folder.glob(".pdlaunch-*"))


def test_srun_serves_over_its_nodes_and_scancel_drains(cluster: Cluster) -> None:
    with cluster.running("srun", *TWO_TASKS, *SERVE) as srun:
        assert cluster.ready() == SPREAD
        (file,) = cluster.folder.glob(".pdlaunch-*.join.json")
        assert file.stat().st_mode & 0o777 == 0o600
        right = ask(cluster)
        assert right is not None
        assert ask(cluster, lambda: cluster.run("scancel", *cluster.jobs())) == right
        srun.wait(TIMEOUT_S)
    await_end(cluster)


def test_a_launch_in_an_allocation_of_salloc_is_cancelled_alone(cluster: Cluster) -> None:
    """Its step is, as somebody does who goes on to use the allocation."""
    after = "srun --ntasks 2 hostname"
    script = f"{shlex.join(('srun', *SERVE))}; {after}"
    with cluster.running("salloc", *TWO_TASKS, "sh", "-c", script) as salloc:
        assert cluster.ready() == SPREAD
        (step,) = cluster.run("squeue", "--noheader", "--steps", "--format=%i").split()
        right = ask(cluster)
        assert right is not None
        # Without the signal Slurm kills a step at once.
        assert ask(cluster, lambda: cluster.run("scancel", "--signal=TERM", step)) == right
        salloc.wait(TIMEOUT_S)
        assert salloc.returncode == 0, cluster.output()
    assert {"n1", "n2"} <= set(cluster.output().splitlines())
    await_end(cluster)


def test_a_heterogeneous_job_serves_until_its_time_limit(cluster: Cluster) -> None:
    with cluster.running("srun", *ONE_TASK, *SERVE, ":", *ONE_TASK, *SERVE) as srun:
        assert cluster.ready() == SPREAD
        limit(cluster, 1)
        ask_until_its_end(cluster)
        srun.wait(TIMEOUT_S)
    await_end(cluster)


def test_the_example_for_sbatch_drains_before_its_time_limit(cluster: Cluster) -> None:
    job = cluster.run("sbatch", "--parsable", str(ROOT / "examples/slurm.sbatch"), FILE).strip()
    assert cluster.ready() == SPREAD
    limit(cluster, 2)
    ask_until_its_end(cluster)
    await_end(cluster)
    shown = cluster.run("scontrol", "show", "job", job)
    assert "JobState=COMPLETED" in shown, f"{shown}\n{cluster.output()}"


def test_several_tasks_on_a_node_are_refused_by_each(cluster: Cluster) -> None:
    with cluster.running("srun", "--nodes=2", "--ntasks-per-node=2", *SERVE) as srun:
        srun.wait(TIMEOUT_S)
    assert cluster.output().count("Slurm runs 4 tasks on 2 nodes") == 4
    await_end(cluster)


WIDE = "wide.yaml"
SERVE_WIDE = tuple(WIDE if word == FILE else word for word in SERVE)


def test_an_engine_over_both_nodes(cluster: Cluster) -> None:
    """The engine is a stand-in for vLLM, with prefill over both nodes."""
    settings = stand_in(cluster.folder / "wide", **TWO_HEADS) | {
        "prefill": {"tensor_parallel_size": 2, "nnodes": 2},
        "routing": {"policy": "pairs"},
        "log_dir": str(cluster.folder / "logs"),
    }
    (cluster.folder / WIDE).write_text(json.dumps(settings))
    dry_run = (*SERVE_WIDE, "--dry-run", "--format", "json")
    plan = cluster.run("srun", *TWO_TASKS, *dry_run)
    hosts = {each["name"]: each["host"] for each in json.loads(plan)["processes"]}
    assert (hosts["prefill-0"], hosts["prefill-0/node-1"]) == ("local", "n2")
    assert cluster.run("salloc", "--quiet", *TWO_TASKS, *dry_run) == plan
    cluster.until(lambda: not cluster.jobs())

    with cluster.running("srun", *TWO_TASKS, *SERVE_WIDE) as srun:
        assert cluster.ready()["prefill-0"].startswith("local")
        assert cluster.network["n2"].find("--headless")
        url = f"http://127.0.0.1:{PORT}/v1/completions"
        status, answer = cluster.login.get(url, "--json", json.dumps(STAND_IN_QUESTION))
        assert status == 200, answer
        assert answer["choices"][0]["token_ids"] == ANSWER
        cluster.run("scancel", *cluster.jobs())
        srun.wait(TIMEOUT_S)
    await_end(cluster)
