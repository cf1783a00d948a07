"""``programs.py NAME URL MODEL_DIR``: what a user of a client library writes; it fails by an error.

The demo model is weak, so a program asserts that answers have the form that it asks for, which a
grammar guarantees, and nothing of what they say. Runs in the environment of ``install.sh``.
"""

import json
import math
import sys
from typing import Any, Literal

from pydantic import BaseModel, Field

MODEL, KEY = "smollm2", "unused"
QUESTION = [{"role": "user", "content": "How is the weather in Oslo?"}]


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Rome"]
    sky: str = Field(max_length=12)
    degrees: int = Field(ge=-40, le=50)


class Anything(BaseModel, extra="allow"):
    """Any object."""


def of_openai(url: str, _: str) -> None:
    import openai

    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    fields: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0}
    parsed = client.chat.completions.parse(**fields, response_format=Weather)
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    tool = openai.pydantic_function_tool(Weather)
    for choice in ("required", {"type": "function", "function": {"name": "Weather"}}):
        forced = fields | {"tools": [tool], "tool_choice": choice, "parallel_tool_calls": False}
        called = client.chat.completions.parse(**forced).choices[0].message.tool_calls[0]
        assert isinstance(called.function.parsed_arguments, Weather)
        with client.chat.completions.stream(**forced) as stream:
            events = [event.type for event in stream]
            final = stream.get_final_completion().choices[0].message.tool_calls[0]
        assert events.count("tool_calls.function.arguments.delta") > 3
        assert final.function.arguments == called.function.arguments
    # Nothing makes the model call here; what it writes has to be read all the same.
    written = 'Well. <tool_call>{"name": "Weather", "arguments": {"city": "Oslo"}}</tool_call>'
    answer = client.chat.completions.create(
        **fields, tools=[tool], extra_body={"structured_outputs": {"choice": [written]}}
    )
    (call,) = answer.choices[0].message.tool_calls
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == (
        "tool_calls",
        "Well. ",
    )
    assert call.function.arguments == '{"city": "Oslo"}'
    # tool_choice auto: the model itself answers with text, or calls as it has called before.
    greet = [{"role": "user", "content": "Say hello."}]
    said = client.chat.completions.create(**fields | {"messages": greet}, tools=[tool]).choices[0]
    assert (said.finish_reason, bool(said.message.content)) == ("stop", True)
    assert not said.message.tool_calls
    called = '<tool_call>\n{"name": "Weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    before = [
        {"role": "user", "content": "How is the weather in Rome?"},
        {"role": "assistant", "content": called},
    ]
    steered = fields | {"messages": before + QUESTION}
    chosen = client.chat.completions.create(**steered, tools=[tool]).choices[0]
    assert chosen.finish_reason == "tool_calls"
    assert json.loads(chosen.message.tool_calls[0].function.arguments)["city"] == "Oslo"
    history = [*QUESTION, answer.choices[0].message, _result_of(call.id)]
    client.chat.completions.create(**fields | {"messages": history}, tools=[tool], max_tokens=4)


def of_openai_responses(url: str, _: str) -> None:
    import openai

    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    fields: dict[str, Any] = {"model": MODEL, "input": "Oslo?", "temperature": 0}
    assert client.responses.create(**fields, max_output_tokens=5).status == "incomplete"
    parsed = client.responses.parse(**fields, text_format=Weather)
    assert isinstance(parsed.output_parsed, Weather)
    tool = openai.pydantic_function_tool(Weather)["function"] | {"type": "function"}
    with client.responses.stream(**fields, tools=[tool], tool_choice="required") as stream:
        assert any(event.type == "response.function_call_arguments.delta" for event in stream)
        calls = stream.get_final_response().output
    assert [Weather.model_validate_json(call.arguments) for call in calls]
    result = {"type": "function_call_output", "call_id": calls[0].call_id, "output": "sunny"}
    history = [{"role": "user", "content": "Oslo?"}, calls[0].model_dump(), result]
    fields |= {"input": history, "max_output_tokens": 4}
    assert client.responses.create(**fields).output_text
    try:
        client.embeddings.create(model=MODEL, input="Oslo")
    except openai.NotFoundError as error:
        assert "embeddings are not served" in str(error)  # noqa: PT017 - without pytest
    else:
        raise AssertionError("embeddings were answered")


def _result_of(call_id: str) -> dict[str, str]:
    return {"role": "tool", "tool_call_id": call_id, "content": "sunny"}


def of_instructor(url: str, _: str) -> None:
    import instructor
    import openai

    # In the mode JSON the schema stands in the prompt alone.
    for mode, wanted in (("TOOLS", Weather), ("JSON", Anything), ("JSON_SCHEMA", Weather)):
        client = instructor.from_openai(
            openai.OpenAI(base_url=url, api_key=KEY), mode=instructor.Mode[mode]
        )
        question = [{"role": "user", "content": "Say hello with an empty object."}]
        answer = client.chat.completions.create(
            model=MODEL, messages=question, response_model=wanted, max_retries=0, temperature=0
        )
        assert isinstance(answer, wanted), mode


def of_pydantic_ai(url: str, _: str) -> None:
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key=KEY))
    for output in (Weather, NativeOutput(Weather)):
        answer = Agent(model, output_type=output).run_sync("How is the weather in Oslo?")
        assert isinstance(answer.output, Weather)

    agent = Agent(model, model_settings={"max_tokens": 16})

    @agent.tool_plain
    def sky(city: str) -> str:
        return f"The sky over {city} is blue."

    assert isinstance(agent.run_sync("Hello").output, str)


def of_langchain(url: str, _: str) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=url, api_key=KEY, model=MODEL, max_retries=0, temperature=0)
    for method in ("json_schema", "function_calling"):
        answer = chat.with_structured_output(Weather, method=method).invoke("Oslo?")
        assert isinstance(answer, Weather), method
    calls = chat.bind_tools([Weather], tool_choice="any").invoke("Oslo?").tool_calls
    assert [Weather(**call["args"]) for call in calls]


def of_llama_index(url: str, _: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    fields = {"model": MODEL, "api_base": url, "api_key": KEY, "is_chat_model": True}
    llm = OpenAILike(**fields, is_function_calling_model=True, max_tokens=200)
    answer = llm.as_structured_llm(Weather).chat([ChatMessage(content="Oslo?")])
    assert isinstance(answer.raw, Weather)


def of_litellm(url: str, _: str) -> None:
    import litellm

    fields = {"model": f"openai/{MODEL}", "api_base": url, "api_key": KEY, "messages": QUESTION}
    answer = litellm.completion(**fields, response_format=Weather)
    assert Weather.model_validate_json(answer.choices[0].message.content)
    loose = litellm.completion(**fields, response_format={"type": "json_object"}, max_tokens=8)
    assert loose.choices[0].message.content.startswith("{")


def of_lm_eval(url: str, model_dir: str) -> None:
    import openai
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    context = "The capital of France is"
    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    drawn = client.completions.create(
        model=MODEL, prompt=context, max_tokens=1, temperature=0, logprobs=1
    ).choices[0]
    lm = LocalCompletionsAPI(
        base_url=f"{url}/completions", model=MODEL, tokenizer=model_dir, batch_size=2
    )
    pairs = [(context, drawn.text), (context, " a tangerine"), ("", context)]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs
    ]
    (best, is_greedy), (other, is_other_greedy), (alone, _) = lm.loglikelihood(requests)
    assert math.isclose(best, drawn.logprobs.token_logprobs[0], abs_tol=1e-3)
    assert (is_greedy, is_other_greedy) == (True, False)
    assert -200 < other < best
    assert -200 < alone < 0


if __name__ == "__main__":
    name, base, folder = sys.argv[1:]
    globals()[f"of_{name}"](base, folder)
