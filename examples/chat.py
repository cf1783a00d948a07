"""Stream a chat from a running deployment with the official openai client: `pip install openai`,
then `python examples/chat.py`.
"""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="unused")
stream = client.chat.completions.create(
    model="smollm2",
    messages=[{"role": "user", "content": "Name three rivers in Europe."}],
    max_tokens=60,
    temperature=0,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)  # noqa: T201
print()  # noqa: T201
