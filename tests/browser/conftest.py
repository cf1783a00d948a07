"""One launch of the demo model and one Chromium, which ``make test-browser`` needs."""

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.browser.chromium import Page, find_chromium, new_page, running_chromium, there
from tests.e2e.client import Deployment, running_deployment
from tests.e2e.conftest import clean_environ
from tests.e2e.faults import fault_variables

KEY = "key-of-the-clients"


@pytest.fixture(scope="session")
def chromium() -> str:
    command = find_chromium()
    if command is None:
        pytest.skip("there is no Chromium: tests/browser/install.sh installs Debian's")
    return command


@pytest.fixture(scope="session")
def deployment(chromium: str) -> Iterator[Deployment]:
    """Some of its pulls meet faults; those that only take time take none."""
    faults = {"rate": 0.3, "slow_s": 0, "lost_s": 0}
    no_others = {"lease_rate": 0, "chunk_rate": 0}
    environ = clean_environ() | fault_variables(faults | no_others) | {"PDLAUNCH_API_KEY": KEY}
    with running_deployment(
        ("--max-model-len", "512", "--kv-cache-memory", "64MiB"), environ=environ
    ) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[int]:
    """The port of its DevTools."""
    with running_chromium(chromium) as port:
        yield port


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def page(browser: int, deployment: Deployment) -> AsyncIterator[Page]:
    """The page of the deployment, which has asked for the key and got it."""
    async with new_page(browser) as page:
        await page.show(1280, 800, "light")
        await page.open(deployment.url)
        await page.until("!document.querySelector('#key-form').hidden")
        await page.type(KEY)
        await page.press("Enter", 13)
        await page.until(there('.engine[data-name="decode-0"]'))
        yield page
