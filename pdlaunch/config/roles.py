"""Names the roles and the kinds of engines."""

from typing import Literal, get_args

# ``prefill`` engines hand a prompt's KV blocks to ``decode`` engines; ``both`` do requests alone
Role = Literal["prefill", "decode", "both"]
ROLES: tuple[Role, ...] = get_args(Role)
PAIR: tuple[Role, Role] = ("prefill", "decode")  # The roles whose engines exchange KV blocks
EngineName = Literal["native", "vllm"]  # The engine's program: pdlaunch's own, or vLLM
HOW_TO_GET_VLLM = (
    "install vllm with pip in an environment of its own, and start with --engine vllm and "
    "--engine-command ENVIRONMENT/bin/vllm"
)
