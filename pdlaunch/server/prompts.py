"""Prompts of a request as token ids."""

from __future__ import annotations

from pdlaunch.errors import RequestError
from pdlaunch.protocol.openai.chat import ChatCompletionRequest
from pdlaunch.protocol.openai.completions import CompletionRequest
from pdlaunch.protocol.openai.tokenize import TokenizeChatRequest
from pdlaunch.server.served_model import ServedModel


async def completion_prompts(request: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """One list a prompt; token ids are taken as they are."""
    return [
        await model.tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens) if isinstance(prompt, str) else prompt
        for prompt in request.prompts
    ]


async def chat_prompt(request: ChatCompletionRequest | TokenizeChatRequest, model: ServedModel) -> list[int]:
    """The messages, rendered by the model's chat template. Raises RequestError."""
    if model.chat_template is None:
        raise RequestError(f"the model {model.name!r} has no chat template; use /v1/completions", param="messages")
    text = model.chat_template.render(
        [message.for_template() for message in request.messages],
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        variables=request.chat_template_kwargs,
    )
    return await model.tokenizer.encode(text, add_special_tokens=request.add_special_tokens)
