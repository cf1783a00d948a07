"""Rules PD3xx judge the settings of pairs; ``transfer_rules.py`` judges measured pairs."""

from collections.abc import Iterator
from pathlib import Path

from pdlaunch.checks.context import Context, pair, peers
from pdlaunch.checks.rule import Found, error
from pdlaunch.planning.role_engines import RoleEngines

KV_LAYOUT = "pdlaunch's KV layout and handshake."
_SHAPE = (
    *("architecture", "model_type", "num_layers", "num_attention_heads", "num_kv_heads"),
    *("head_dim", "hidden_size", "vocab_size", "num_parameters"),
)
_Pair = tuple[RoleEngines, RoleEngines]


def _different_shapes(sides: _Pair) -> str:
    prefill, decode = (side.shape for side in sides)
    if prefill is None or decode is None:
        return ""
    # Field by field, so that the message names only the fields that differ.
    values = ((name, getattr(prefill, name), getattr(decode, name)) for name in _SHAPE)
    differing = [f"{name} ({left}, {right})" for name, left, right in values if left != right]
    if not differing and prefill.layer_windows != decode.layer_windows:
        differing = ["the windows of layers"]
    return f"prefill and decode differ in {', '.join(differing)}" if differing else ""


def _block_sizes(sides: _Pair) -> Found | None:
    prefill, decode = (side.block_size for side in sides)
    # On GPUs, decode of vLLM can read blocks that are smaller than its own by a whole factor.
    may_be_parts = all(side.device == "cuda" and not side.is_native for side in sides)
    if prefill == decode or (may_be_parts and prefill and decode and decode % prefill == 0):
        return None
    sizes = [str(size or "what vLLM chooses") for size in (prefill, decode)]
    return Found(f"block_size of prefill is {sizes[0]}, of decode {sizes[1]}")


def _same_folder(left: str | None, right: str | None) -> bool:
    return not left or not right or Path(left).resolve() == Path(right).resolve()


def _beside_both(context: Context) -> Iterator[_Pair]:
    """Yield each side of the pair together with the engines of role ``both``."""
    if both := context.engines.get("both"):
        yield from ((other, both) for other in peers(context))


def _both_differ(sides: _Pair) -> Found | None:
    other, both = sides
    formats = [each.settings.load_format for each in sides]
    if formats[0] != formats[1]:
        message = f"load_format of {other.role} is {formats[0]}, of both {formats[1]}"
        return Found(message, "load_format")
    if other.shape != both.shape:
        return Found(f"{other.role} and both serve models of different shapes")
    is_same = _same_folder(other.model.path, both.model.path)
    return (
        None
        if is_same
        else Found(f"{other.role} serves {other.model.path}, both {both.model.path}")
    )


# fmt: off
RULES = (
    error("PD301", "Prefill and decode serve models of different shapes.",
        "Only the same model can use the numbers in KV blocks. Each head's part of a block is one "
        "region, and a block holds the layers of one group. If the windows of layers differ, a "
        "block has no counterpart.",
        over=pair, when=_different_shapes, at="model",
        fix="Set model once, at the top level.", source=KV_LAYOUT, needs=("model",), on_vllm=True),
    error("PD303", "Prefill and decode use different dtypes.",
        "KV blocks are copied as bytes. In another dtype the bytes are other numbers.",
        over=pair,
        when=lambda it: it[0].dtype and it[1].dtype and it[0].dtype != it[1].dtype and Found(),
        at="dtype", message="prefill computes in {0.dtype}, decode in {1.dtype}",
        fix="Set dtype once, at the top level.", source=KV_LAYOUT, on_vllm=True),
    error("PD304", "The block sizes of prefill and decode do not fit.",
        "Whole blocks are transferred, and their hashes chain over block_size tokens each. Only "
        "decode of vLLM on a GPU can use a multiple of prefill's block size. Without block_size, "
        "vLLM chooses a size.",
        over=pair, when=_block_sizes, at="block_size",
        fix="Set block_size once, at the top level.",
        source=f"{KV_LAYOUT} vLLM 0.32: _validate_remote_agent_handshake.", on_vllm=True),
    error("PD309", "Prefill accepts longer requests than decode.",
        "Prefill computes a prompt that decode then refuses. The work is lost, and the client gets "
        "a late error.",
        over=pair,
        when=lambda it: (longest := it[1].max_model_len) and (it[0].max_model_len or 0) > longest,
        at="max_model_len",
        message="prefill takes {0.max_model_len} tokens, decode {1.max_model_len}",
        fix="Set max_model_len once, at the top level.", source="The life of a request.",
        needs=("model",), on_vllm=True),
    error("PD314", "The connector nixl cannot join a GPU and a CPU.",
        "On every path, a rank reads only from peers on the same kind of device. No pair would "
        "shake hands, and the launch would never be ready.",
        over=lambda context: pair(context) if context.uses("nixl") else (),
        when=lambda it: it[0].device != it[1].device, at="device",
        message="prefill runs on {0.device} and decode on {1.device}, which the connector nixl "
        "does not join",
        fix="Set device once, at the top level, or set kv_transfer.connector to file.",
        source="The connector nixl: both of its paths join memory of one kind.", needs=("gpus",),
        on_vllm=True),
    error("PD317", "Prefill and decode load different revisions of a model.",
        "The weights differ, and with them the meaning of the numbers in KV blocks. Answers are "
        "wrong, with HTTP 200.",
        over=pair,
        when=lambda it: it[0].settings.model == it[1].settings.model
        and it[0].settings.revision != it[1].settings.revision, at="revision",
        message="prefill loads revision {0.settings.revision}, decode {1.settings.revision}",
        fix="Set revision once, at the top level.",
        source="vllm-project/vllm#55776: NIXL's handshake does not compare revisions.",
        on_vllm=True),
    error("PD316", "Engines of role both serve another model than prefill and decode.",
        "The router treats these engines as equal. An answer would come from either model, and an "
        "answer that another engine continues would come from two.",
        over=_beside_both, when=_both_differ, at="model",
        fix="Set model and load_format once, at the top level.",
        source="The router sends requests to either, and continues a stream at the other.",
        needs=("model",), on_vllm=True),
)
# fmt: on
