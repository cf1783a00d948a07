"""Drives a headless Chromium over its DevTools protocol, which needs nothing but the browser."""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import aiohttp

START_TIMEOUT_S = 180.0
WAIT_S = 120.0
Scheme = Literal["light", "dark"]


def find_chromium() -> str | None:
    """Return the browser's command, that of ``PDLAUNCH_TEST_CHROMIUM`` first."""
    named = os.environ.get("PDLAUNCH_TEST_CHROMIUM")
    return named or next(
        (path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None
    )


def there(selector: str) -> str:
    """The expression that is true once the page has such an element."""
    return f"document.querySelector({json.dumps(selector)}) !== null"


class Page:
    """Is one tab. ``complaints`` gets errors and warnings of its console, and failed loads."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.ensure_future(self._read())
        self.complaints: list[str] = []
        self.requests: list[dict[str, Any]] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(WAIT_S):
            return await answer

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def run(self, script: str) -> Any:
        """Return the value of an expression; of a promise, what it resolves to."""
        answer = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, script: str) -> Any:
        """Wait for an expression to be true, and return its value."""
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    if value := await self.run(script):
                        return value
                    await asyncio.sleep(0.05)
        except TimeoutError:
            text = await self.run("document.body.innerText")
            raise AssertionError(f"{script}\n{self.complaints}\n{text}") from None

    async def show(self, width: int, height: int, scheme: Scheme) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        await self.call(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": scheme},
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ],
        )
        # Two frames: the page draws anew when its size has changed.
        await self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")

    async def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                text="\r" if key == "Enter" and kind == "keyDown" else "",
            )

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def screenshot(self, file: Path) -> None:
        answer = await self.call("Page.captureScreenshot", format="png")
        await asyncio.to_thread(file.write_bytes, base64.b64decode(answer["data"]))

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                answer = self._answers.pop(told["id"])
                if "error" in told:
                    answer.set_exception(RuntimeError(str(told["error"])))
                elif not answer.done():
                    answer.set_result(told["result"])
            else:
                self._hear(told["method"], told["params"])

    def _hear(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(str(params["entry"]))
            case "Network.requestWillBeSent":
                self.requests.append(params["request"])


@contextlib.asynccontextmanager
async def new_page(port: int) -> AsyncIterator[Page]:
    """Open a tab of the browser that listens at ``port``, and close it."""
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        async with session.put("/json/new?about:blank") as response:
            target = await response.json(content_type=None)
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=2**27) as socket:
            page = Page(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await page.call(f"{domain}.enable")
            yield page
            await page.close()
        async with session.get(f"/json/close/{target['id']}"):
            pass


@contextlib.contextmanager
def running_chromium(command: str) -> Iterator[int]:
    """Run the browser while the block runs; yields the port of its DevTools."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [
                command,
                "--headless=new",
                "--remote-debugging-port=0",
                f"--user-data-dir={folder}",
                # Tests may run as root, and in containers whose /dev/shm is small.
                "--no-sandbox",
                "--disable-dev-shm-usage",
                "--disable-gpu",
                "--disable-background-networking",
                "--no-first-run",
                # Nothing that a page loads may come from elsewhere.
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                "--hide-scrollbars",
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield _port(Path(folder) / "DevToolsActivePort", process)
        finally:
            process.terminate()
            process.wait(180)


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    until_at = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until_at:
        assert process.poll() is None, "Chromium has ended"
        # Written whole at the end of its start; before that it is empty or missing.
        with contextlib.suppress(FileNotFoundError):
            lines = file.read_text().splitlines()
            if len(lines) == 2:
                return int(lines[0])
        time.sleep(0.05)
    raise TimeoutError("Chromium does not open its DevTools")
