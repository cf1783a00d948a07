"""Stream a chat from a running deployment with the official openai client: `pip install openai`,
then `python examples/chat.py`. For another port or host: `python examples/chat.py http://HOST:PORT`.
"""

import os
import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("PDLAUNCH_API_KEY", "unused"))
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "Name three rivers in Europe."}],
    max_tokens=60,
    temperature=0,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)  # noqa: T201
print()  # noqa: T201
