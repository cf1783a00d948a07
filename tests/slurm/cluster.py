"""Slurm itself on this machine: a controller, and a slurmd on each of two hosts of namespaces.

It uses no ports, files or processes of a Slurm that may be installed here.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.conftest import clean_environ
from tests.e2e.waiting import await_true
from tests.netns.hosts import ROOT, Host, Network, new_network

NODES = ("n1", "n2")
CONTROLLER = NODES[0]
TIMEOUT_S = 240.0
PORT = 8000
_PROGRAMS = ("slurmctld", "slurmd", "srun", "salloc", "sbatch", "scancel", "sinfo", "squeue")
# Signals go to all descendants of a task, as with control groups, which are used in earnest.
_CONFIG = """\
ClusterName=tests
SlurmctldHost={controller}({address})
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir=/tmp/slurmd
SlurmctldPidFile=/tmp/slurmctld.pid
SlurmdPidFile=/tmp/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1
PropagateResourceLimits=NONE
{nodes}
PartitionName=all Nodes={names} Default=YES State=UP
"""


def missing_programs() -> list[str]:
    return [name for name in _PROGRAMS if shutil.which(name) is None]


@dataclass(frozen=True)
class Cluster:
    network: Network
    folder: Path
    """A folder that all nodes share."""

    @property
    def login(self) -> Host:
        """The host on which commands are given, and tasks 0 run."""
        return self.network[CONTROLLER]

    @property
    def environ(self) -> dict[str, str]:
        return clean_environ() | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{self.folder}/bin{os.pathsep}{os.environ['PATH']}",
        }

    def command(self, *words: str) -> list[str]:
        """A command that runs on the login host, in the folder that all share."""
        return self.login.command("env", "-C", str(self.folder), *words)

    def run(self, *words: str, can_fail: bool = False) -> str:
        done = subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=self.environ,
            check=False,
        )
        assert can_fail or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def running(self, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a command; what it prints is in ``output``."""
        with (
            (self.folder / "output").open("wb") as output,
            self.login.running(
                *("env", "-C", str(self.folder), *words),
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            yield process

    def output(self) -> str:
        names = ("output", *(path.name for path in self.folder.glob("slurm-*.out")), "slurm.log")
        return "\n".join(
            f"--- {name}\n{(self.folder / name).read_text(errors='replace')}"
            for name in names
            if (self.folder / name).exists()
        )

    def jobs(self) -> list[str]:
        return self.run("squeue", "--noheader", "--format=%i").split()

    def get(self, path: str) -> tuple[int, Any]:
        return self.login.get(f"http://127.0.0.1:{PORT}{path}")

    def until(self, is_so: Callable[[], bool]) -> None:
        await_true(is_so, lambda: f"{self.output()}\n{self.stranded()}", TIMEOUT_S)

    def ready(self) -> dict[str, str]:
        """Wait for a launch that answers; return the hosts of its engines."""
        self.until(lambda: bool(self.jobs()))

        def is_ready() -> bool:
            assert self.jobs(), self.output()
            return self.get("/health")[0] == 200

        self.until(is_ready)
        _, status = self.get("/pdlaunch/status")
        return {engine["name"]: engine["host"] for engine in status["engines"]}

    def stranded(self) -> list[list[str]]:
        found = []
        for name in NODES:
            for process in self.network[name].processes():
                with contextlib.suppress(psutil.Error):  # It has ended.
                    if not Path(process.exe()).name.startswith("slurm"):
                        found.append(process.cmdline())
        return found


@contextlib.contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    with (
        new_network(*NODES) as network,
        # /tmp of each host is its own.
        tempfile.TemporaryDirectory(dir="/var/tmp", prefix="pdlaunch-slurm-") as name,
        contextlib.ExitStack() as stack,
    ):
        cluster = Cluster(network, Path(name))
        _write_settings(cluster)
        log = stack.enter_context((cluster.folder / "slurm.log").open("wb"))
        daemons = [(network[each], ("slurmd", "-D", "-N", each)) for each in NODES]
        for host, words in [(cluster.login, ("slurmctld", "-D")), *daemons]:
            running = host.running(
                *words,
                env=cluster.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            stack.enter_context(running)
        idle = ("sinfo", "--noheader", "--states=idle", "--format=%D")
        cluster.until(lambda: cluster.run(*idle, can_fail=True).strip() == str(len(NODES)))
        yield cluster


def _write_settings(cluster: Cluster) -> None:
    hosts = [cluster.network[each] for each in NODES]
    nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs=4" for host in hosts]
    text = _CONFIG.format(
        controller=CONTROLLER,
        address=cluster.login.address,
        folder=cluster.folder,
        nodes="\n".join(nodes),
        names=",".join(NODES),
    )
    (cluster.folder / "slurm.conf").write_text(text)
    # The hosts' /sys has no control groups, and none are used.
    (cluster.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (cluster.folder / "state").mkdir()
    # The command as somebody has installed it on all nodes.
    command = cluster.folder / "bin" / "pdlaunch"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m pdlaunch "$@"\n')
    command.chmod(0o755)
