"""Regions of vLLM's KV caches: what lies in a block moves with it, in every form that versions 0.24
to 0.33 use; what is not known is refused.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from pdlaunch.transfer.regions import KVRegions
from pdlaunch.vllm.layout import UnknownLayout, VllmLayout, read_layout

NUM_BLOCKS, BLOCK_SIZE, HEADS, DIM = 6, 4, 2, 8


class FullAttentionSpec:
    block_size = BLOCK_SIZE


class MLAAttentionSpec(FullAttentionSpec):
    pass


class MambaSpec(FullAttentionSpec):
    mamba_type = "mamba2"


class SlidingWindowSpec(FullAttentionSpec):
    sliding_window = 7


@dataclass
class Group:
    layer_names: list[str]
    kv_cache_spec: Any = field(default_factory=FullAttentionSpec)


@dataclass
class Config:
    kv_cache_groups: list[Group]
    num_blocks: int


def read(
    caches: dict[str, Any],
    *groups: Group,
    total: int = HEADS,
    tp_size: int = 1,
    num_stages: int = 1,
    rank: int = 0,
    by_head: bool = True,
    num_blocks: int = NUM_BLOCKS,
) -> VllmLayout:
    return read_layout(
        caches,
        Config(list(groups) or [Group(list(caches))], num_blocks),
        total_kv_heads=total,
        tp_size=tp_size,
        num_stages=num_stages,
        rank=rank,
        by_head=by_head,
    )


def numbered(*shape: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """A cache of different values; ``order``: the physical order of its dimensions."""
    order = order or tuple(range(len(shape)))
    physical = torch.arange(torch.Size(shape).numel(), dtype=torch.int32)
    physical = physical.view([shape[dim] for dim in order])
    return physical.permute([order.index(dim) for dim in range(len(shape))])


def packed_layers() -> list[torch.Tensor]:
    """Two layers of one buffer, side by side in each block, as from 0.29 on."""
    shape = NUM_BLOCKS, HEADS, BLOCK_SIZE, 2 * DIM
    layer = HEADS * BLOCK_SIZE * 2 * DIM
    whole = numbered(NUM_BLOCKS * 2 * layer)
    strides = 2 * layer, BLOCK_SIZE * 2 * DIM, 2 * DIM, 1
    return [whole.as_strided(shape, strides, index * layer) for index in range(2)]


FORMS = {
    "4-D by head": (True, lambda: [numbered(NUM_BLOCKS, HEADS, BLOCK_SIZE, 2 * DIM)]),
    "4-D by token": (
        False,
        lambda: [numbered(NUM_BLOCKS, HEADS, BLOCK_SIZE, 2 * DIM, order=(0, 2, 1, 3))],
    ),
    "5-D by head": (
        True,
        lambda: [numbered(NUM_BLOCKS, 2, BLOCK_SIZE, HEADS, DIM, order=(0, 1, 3, 2, 4))],
    ),
    "5-D by token": (False, lambda: [numbered(NUM_BLOCKS, 2, BLOCK_SIZE, HEADS, DIM)]),
    "small kernel blocks": (True, lambda: [numbered(2 * NUM_BLOCKS, HEADS, 2, 2 * DIM)]),
    "small kernel blocks by token": (False, lambda: [numbered(2 * NUM_BLOCKS, 2, 2, HEADS, DIM)]),
    "one buffer": (True, packed_layers),
    "bytes": (True, lambda: [numbered(NUM_BLOCKS, HEADS, 4, 16).to(torch.uint8)]),
}


def move(of: KVRegions, to: KVRegions, theirs: list[list[int]], ours: list[list[int]]) -> None:
    heads = range(of.num_heads)
    for here, there in zip(to.views(ours, heads), of.views(theirs, heads), strict=True):
        here.copy_(there)


@pytest.mark.parametrize("by_head", [True, False], ids=["heads", "pages"])
@pytest.mark.parametrize(("cut", "make"), FORMS.values(), ids=FORMS)
def test_a_block_moves_whole_and_nothing_beside_it(cut: bool, make: Any, by_head: bool) -> None:
    sources = {f"layer.{index}": cache for index, cache in enumerate(make())}
    targets = {name: cache.clone() for name, cache in sources.items()}
    if len(sources) > 1:  # in one buffer again
        targets = {f"layer.{index}": cache for index, cache in enumerate(make())}
    for cache in targets.values():
        cache.fill_(255 if cache.dtype == torch.uint8 else -1)
    of, to = read(sources, by_head=by_head), read(targets, by_head=by_head)
    assert (of.kv.num_heads, of.total_heads) == ((HEADS, HEADS) if cut and by_head else (1, 1))
    assert (of.pages, of.groups) == (to.pages, to.groups)
    move(of.kv, to.kv, [[1, 4]], [[3, 0]])
    for name, source in sources.items():
        rows = len(source) // NUM_BLOCKS
        source, target = (
            each.reshape(NUM_BLOCKS, rows, *each.shape[1:]) for each in (source, targets[name])
        )
        assert torch.equal(target[[3, 0]], source[[1, 4]])
        rest = target[[1, 2, 4, 5]]
        assert bool((rest == rest.flatten()[0]).all())


def test_a_rank_reads_one_head_of_an_engine_that_has_two() -> None:
    both, one = numbered(NUM_BLOCKS, 2, BLOCK_SIZE, 16), torch.zeros(NUM_BLOCKS, 1, BLOCK_SIZE, 16)
    of, to = read({"a": both}), read({"a": one.int()}, tp_size=2, rank=1)
    assert (to.first_head, to.kv.num_heads, to.total_heads) == (1, 1, 2)
    assert of.pages == to.pages, "engines of other TP sizes fit"
    (there,) = of.kv.views([[5]], range(1, 2))
    assert torch.equal(there.view(torch.int32).view(BLOCK_SIZE, 16), both[5, 1])


def test_every_rank_has_all_of_latent_attention_and_one_page_where_pages_are_whole() -> None:
    latent = read({"a": numbered(NUM_BLOCKS, 4, 9)}, Group(["a"], MLAAttentionSpec()), tp_size=2)
    assert (latent.total_heads, latent.first_head, latent.kv.num_heads) == (1, 0, 1)
    by_token = numbered(NUM_BLOCKS, HEADS, BLOCK_SIZE, 16, order=(0, 2, 1, 3))
    whole = read({"a": by_token}, total=4, tp_size=2, rank=1)
    assert (whole.total_heads, whole.first_head) == (2, 1)


@pytest.mark.parametrize("spec", [FullAttentionSpec(), MLAAttentionSpec()])
def test_a_rank_of_a_pipeline_stage_reads_whole_pages_of_the_same_rank(spec: Any) -> None:
    cache = numbered(NUM_BLOCKS, 4, 9) if isinstance(spec, MLAAttentionSpec) else None
    cache = numbered(NUM_BLOCKS, 1, BLOCK_SIZE, 16) if cache is None else cache
    second = read({"a": cache}, Group(["a"], spec), tp_size=2, num_stages=2, rank=3)
    assert (second.total_heads, second.first_head, second.kv.num_heads) == (4, 3, 1)
    assert second.pages.endswith("stage 2 of 2")


def test_groups_share_memory_and_layers_without_a_spec_are_left_out() -> None:
    shared, own = (numbered(NUM_BLOCKS, HEADS, BLOCK_SIZE, 16) for _ in range(2))
    caches = {"a": shared, "b": own, "c": shared, "draft": own}
    layout = read(caches, Group(["a", "b"]), Group(["c"], SlidingWindowSpec()))
    assert layout.kv.groups == ((0, 1), (0,))
    assert len(layout.kv.allocations) == 2
    assert layout.groups == "full: 2 layers of 4 tokens; 7: 1 layers of 4 tokens"


def test_a_state_is_a_page_beside_those_of_attention() -> None:
    keys = numbered(NUM_BLOCKS, HEADS, BLOCK_SIZE, 16)
    state = keys.view(torch.int8).view(NUM_BLOCKS, 1, 1, -1)
    layout = read({"a": keys, "b": state}, Group(["a"]), Group(["b"], MambaSpec()))
    assert layout.groups == "full: 1 layers of 4 tokens; state: 1 layers of 4 tokens"
    assert (layout.kv.num_heads, layout.kv.groups) == (1, ((0,), (0,)))


@pytest.mark.parametrize(
    ("cache", "spec", "reason"),
    [
        ([torch.zeros(6, 2), torch.zeros(6, 3)], MambaSpec(), "state as MambaSpec"),
        (numbered(2, NUM_BLOCKS, 4, 2, 8), FullAttentionSpec(), "block is not contiguous"),
        (numbered(7, HEADS, 4, 16), FullAttentionSpec(), "block is not contiguous"),
        (numbered(NUM_BLOCKS, 4, 4, 16)[:, ::2], FullAttentionSpec(), "block is not contiguous"),
    ],
)
def test_what_is_not_known_is_refused_with_the_reason(cache: Any, spec: Any, reason: str) -> None:
    with pytest.raises(UnknownLayout, match=reason):
        read({"a": cache}, Group(["a"], spec))
