"""All metrics of a deployment on one page: the router's own and what every engine's ``/metrics``
says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from pdlaunch.observe.metrics import render_metrics
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.pool import Engine

logger = logging.getLogger(__name__)


class MetricFamilies:
    """Families by name; what several pages say of one becomes one family."""

    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}

    def add(self, page: str, *, engine: str | None = None) -> None:
        """Add a page in Prometheus's text format, its samples labelled with ``engine``.

        Without an engine of its own no sample can be mistaken for another page's. Raises ValueError
        for a malformed page, of which nothing is added.
        """
        label = {} if engine is None else {"engine": engine}
        for family in list(text_string_to_metric_families(page)):
            known = self._families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            # A page has one type a family; whoever comes with another one is left out.
            if known.type == family.type:
                known.samples += [
                    sample._replace(labels=sample.labels | label) for sample in family.samples
                ]

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client wants a collector to."""
        return iter(self._families.values())


async def scrape(own_page: bytes, client: EngineClient, engines: Collection[Engine]) -> bytes:
    """``own_page`` and the pages of all engines, merged; an engine that does not answer in time is
    missing.
    """
    families = MetricFamilies()
    families.add(own_page.decode())
    pages = await asyncio.gather(*(client.read_metrics(engine) for engine in engines))
    for engine, page in zip(engines, pages, strict=True):
        try:
            families.add(page or "", engine=engine.name)
        except ValueError as error:
            logger.warning("%s: its metrics cannot be read: %s", engine.name, error)
        # Reading a page takes about two milliseconds, in which no answer is streamed.
        await asyncio.sleep(0)
    return render_metrics(families)
