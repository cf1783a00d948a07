"""Deployments and their APIs, with what only tests and benchmarks ask of them."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.launch.client import api, deployment


class Api(api.Api):
    def engine(self, name: str) -> Self:
        return type(self)(**vars(self) | {"url": f"{self.url}/pdlaunch/engines/{name}"})

    def metrics(self) -> dict[str, float]:
        """Return the samples of ``/metrics``, summed over their labels."""
        totals: defaultdict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                totals[sample.name] += sample.value
        return totals


class Deployment(deployment.Deployment):
    def processes(self) -> dict[str, psutil.Process]:
        """Return the running processes by their name in the launch, such as ``decode-0/rank-0``."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # includes ZombieProcess
                command = process.cmdline()
                if "--name" in command:
                    found[command[command.index("--name") + 1]] = process
        return found


def admin_api(*args: Any) -> Api:
    return Api(**vars(api.admin_api(*args)))


@contextlib.contextmanager
def running_deployment(*args: Any, **options: Any) -> Iterator[Deployment]:
    with deployment.running_deployment(*args, **options) as found:
        yield Deployment(**vars(found))
