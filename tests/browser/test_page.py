"""The page of a launch in a real browser: keys, a waterfall, a killed engine, sizes, themes."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from tests.browser.chromium import Page, Scheme, new_page, there
from tests.browser.conftest import KEY
from tests.e2e.client import Api, Deployment

pytestmark = pytest.mark.asyncio(loop_scope="module")
WRONG_KEY = "another key"


async def complete(deployment: Deployment, request_id: str = "", **fields: Any) -> None:
    body = {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0, **fields}
    named = {"X-Request-Id": request_id} if request_id else {}
    api = Api(deployment.url, KEY, headers=named)
    status, answer = await asyncio.to_thread(api.post, "/v1/completions", body)
    assert status == 200, answer


async def test_the_key_is_asked_for_and_stands_in_no_url(
    browser: int, deployment: Deployment
) -> None:
    async with new_page(browser) as page:
        await page.open(deployment.url)
        await page.until("!document.querySelector('#key-form').hidden")
        assert await page.run("document.activeElement.id") == "key"
        assert not await page.run("document.querySelector('.engine') !== null")
        assert deployment.url in await page.run("location.href")
        for key, shown in ((WRONG_KEY, "#notice"), (KEY, "#main")):
            await page.type(key)
            await page.press("Enter", 13)
            await page.until(f"!document.querySelector('{shown}').hidden")
        await page.until(there('.engine[data-name="prefill-0"]'))
        sent = {request["headers"].get("Authorization") for request in page.requests}
        assert sent == {None, f"Bearer {WRONG_KEY}", f"Bearer {KEY}"}
        assert all("key" not in request["url"] for request in page.requests)
        assert KEY not in await page.run("JSON.stringify([localStorage, sessionStorage])")
        # What the browser itself says of the two answers 401, and nothing else.
        assert all("401" in complaint for complaint in page.complaints)


async def test_it_shows_engines_their_pair_and_rates(page: Page, deployment: Deployment) -> None:
    await complete(deployment)
    labels = await page.run(
        "[...document.querySelectorAll('.engine')].map(each => each.getAttribute('aria-label'))"
    )
    assert [label.partition(",")[0] for label in labels] == ["router", "decode-0", "prefill-0"]
    await page.until(there('[data-pair="prefill-0 decode-0"]'))
    pair = await page.run("document.querySelector('[data-pair]').getAttribute('aria-label')")
    assert pair.startswith("prefill-0 to decode-0: ")
    assert "GB/s" in pair
    await page.until("document.querySelector('.tile .more').textContent !== '0 in all'")
    await page.until("/% (pair|decode) [(]/.test(document.querySelector('#routes').textContent)")
    await page.until("/^Limited by: /.test(document.querySelector('#bottleneck').textContent)")
    await page.until("/run|wait/.test(document.querySelector('#drawing').textContent)")


async def test_the_waterfall_of_a_request_opens_with_the_keyboard(
    page: Page, deployment: Deployment
) -> None:
    prompt = "A request whose blocks are pulled: " * 4
    await complete(deployment, request_id="pulled", prompt=prompt)
    links = "[...document.querySelectorAll('#requests .link')]"
    link = f"{links}.find(each => each.textContent.includes('pulled'))"
    await page.until(f"Boolean({link})")
    await page.run(f"{link}.focus()")
    await page.press("Enter", 13)
    await page.until("document.querySelectorAll('.waterfall tbody tr').length > 4")
    rows = await page.run(
        "[...document.querySelectorAll('.waterfall tbody tr')]"
        ".map(row => [row.cells[0].textContent, row.cells[1].textContent])"
    )
    engines = {process.partition("/")[0] for _, process in rows}
    assert engines >= {"router", "prefill-0", "decode-0"}
    assert any("pull" in name for name, _ in rows)
    assert any("prefill" in name for name, _ in rows)
    box = await page.run("document.querySelector('.waterfall').parentElement.className")
    assert box == "scroll whole", "the pull and decode stand at its end"
    bars = await page.run(
        "[...document.querySelectorAll('.waterfall .lane rect:last-child')]"
        ".map(bar => [+bar.getAttribute('x'), +bar.getAttribute('width')])"
    )
    assert all(x >= 0 and width > 0 and x + width <= 1003 for x, width in bars)
    await page.press("Escape", 27)
    await page.until("!document.querySelector('.waterfall')")


async def test_no_name_becomes_markup(page: Page, deployment: Deployment) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    api = Api(deployment.url, KEY)
    await asyncio.to_thread(api.post, "/v1/completions", {"model": hostile, "prompt": "x"})
    await page.until("[...document.querySelectorAll('#requests td')].some(c => c.textContent==404)")
    await page.run(
        "[...document.querySelectorAll('#requests tr')]"
        ".find(row => row.cells[2].textContent == 404).querySelector('.link').click()"
    )
    await page.until(f"document.querySelector('#trace').textContent.includes('{hostile}')")
    assert await page.run("document.querySelectorAll('img').length") == 0
    await page.press("Escape", 27)


async def test_a_killed_engine_turns_red_and_back(page: Page, deployment: Deployment) -> None:
    engine = "document.querySelector('.engine[data-name=\"decode-0\"]')"
    assert await page.run(f"{engine}.dataset.tone") == "ready"
    deployment.processes()["decode-0/rank-0"].kill()
    pill = "document.querySelector('#state').className"
    await page.until(
        f"{engine}.dataset.tone === 'down' && !/starting/.test({engine}.textContent)"
        f" && !{pill}.includes('ready')"
        f" && getComputedStyle({engine}.querySelector('.box')).stroke === 'rgb(207, 42, 42)'"
    )
    await page.until(f"{engine}.dataset.tone === 'ready'")
    for told in ("decode-0/rank-0 was killed", "starts again", "starting (was ready)"):
        await page.until(f"document.querySelector('#events ol')?.textContent.includes('{told}')")


CHARTS = {
    "first-token": "Time to first token: p50 ",
    "inter-token": "Time between tokens: p50 ",
    "tokens": "Tokens per second: prompt ",
}


async def test_charts_draw_times_and_tokens(page: Page, deployment: Deployment) -> None:
    """A point every two seconds: lines begin with the second one that has requests."""
    for place, said in CHARTS.items():
        svg = f"document.querySelector('#{place} svg.chart')"
        drawn = (
            f"{svg} && [...{svg}.querySelectorAll('path')].some(p => /L/.test(p.getAttribute('d')))"
        )
        while not await page.run(drawn):
            await complete(deployment)
        unit = await page.run(f"{svg}.querySelector('text').textContent")
        assert re.fullmatch(r"0 (ms|/s)", unit)
        label = await page.run(f"{svg}.getAttribute('aria-label')")
        assert re.fullmatch(rf"{said}[\d.]+ .+, [a-z0-9]+ [\d.]+ .+", label), label
        legend = await page.run(f"document.querySelector('#{place} .chart-legend').textContent")
        assert [word for word in label.split(": ")[1].split(" ")[:2] if word not in legend] == []


async def test_caches_are_shown_by_tier(page: Page, deployment: Deployment) -> None:
    """The second one of equal prompts is in prefill's cache, and decode has pulled the first."""
    for _ in range(2):
        await complete(deployment, prompt="What is asked twice is there already. " * 6)
    shares = r"device (\d+) % · host (\d+) % · pulled (\d+) %"
    cache = "[...document.querySelectorAll('#caches .cache')].map(each => each.textContent)"
    for engine, tier in (("prefill-0", 1), ("decode-0", 3)):
        told = f"{cache}.map(text => /{engine}{shares}/.exec(text)).find(Boolean)"
        await page.until(f"+{told}?.[{tier}] > 0")
        bars = f"document.querySelector('#caches [aria-label^=\"{engine}: device\"] .remote')"
        if engine == "decode-0":
            assert float(await page.run(f"{bars}.getAttribute('width')")) > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 860), (3840, 2160)])
async def test_it_fits_phones_and_desks_light_and_dark(
    page: Page, deployment: Deployment, tmp_path: Path, width: int, height: int, scheme: Scheme
) -> None:
    await page.show(width, height, scheme)
    await asyncio.gather(*(complete(deployment, prompt=f"{n} and on " * 9) for n in range(3)))
    await page.run("scrollTo(0, 0)")
    drawn = "document.querySelector('.drawing').getBoundingClientRect().width"
    await page.until(f"{drawn} <= {width}")
    await page.until(f"document.documentElement.scrollWidth <= {width}")
    # Where there is no room beside the arrow.
    said = "document.querySelector('.pairs').textContent"
    told = f"/prefill-0 → decode-0 .* GB[/]s/.test({said})"
    await page.until(told if width < 400 else f"!{said}")
    back = await page.run("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(243, 245, 248)", "dark": "rgb(13, 17, 23)"}[scheme]
    file = tmp_path / "page.png"
    await page.screenshot(file)
    assert 5_000 < file.stat().st_size < 800_000


async def test_screen_readers_get_names_and_tables(page: Page) -> None:
    await page.show(1280, 800, "light")
    await page.run("document.querySelector('#as-table').focus()")
    await page.press("Enter", 13)
    await page.until("!document.querySelector('#tables').hidden")
    cells = "document.querySelector('#tables').textContent"
    await page.until(f"{cells}.includes('prefill-0 → decode-0')")
    tree = await page.call("Accessibility.getFullAXTree")
    nodes = [node for node in tree["nodes"] if not node.get("ignored")]
    named = {
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if node["role"]["value"] in ("button", "textbox", "combobox", "image", "table", "region")
    }
    assert all(name for role, name in named if role != "table"), named
    assert {("button", "Show as tables"), ("table", "Engines"), ("table", "Pairs")} <= named
    await page.press("Enter", 13)


async def test_refused_pulls_are_counted_and_the_console_is_clean(
    page: Page, deployment: Deployment
) -> None:
    """A byte of what is pulled is wrong: it is refused, and the answer is right all the same."""
    refused = "/pulls, [1-9][0-9]* failed/.test(document.body.textContent)"
    number = 0
    while not await page.run(refused):
        number += 1
        await complete(deployment, prompt=f"Number {number}: its blocks are new. " * 4)
    assert all("401" in complaint for complaint in page.complaints), page.complaints
