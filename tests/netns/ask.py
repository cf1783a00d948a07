"""``python -m tests.netns.ask URL`` asks a router all questions on standard input at once, and
prints the answers: JSON, or a text that says what went wrong.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import aiohttp

TIMEOUT_S = 240.0


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Any:
    try:
        async with session.post(url, json=body) as response:
            text = await response.text()
            return json.loads(text) if response.status == 200 else f"{response.status} {text}"
    except TimeoutError:
        return "stuck"
    except aiohttp.ClientError as error:
        return f"{error!r}"


async def main() -> None:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    session = aiohttp.ClientSession(timeout=timeout, connector=connector)
    async with session:
        bodies = json.load(sys.stdin)
        answers = await asyncio.gather(*(ask(session, sys.argv[1], body) for body in bodies))
    sys.stdout.write(json.dumps(answers))


if __name__ == "__main__":
    asyncio.run(main())
