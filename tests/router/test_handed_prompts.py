"""What an engine's counts say of prompts that it was handed: an engine of numbers, look by look."""

from __future__ import annotations

import random

import pytest

from pdlaunch.http.watch.engine_api import Counts
from pdlaunch.router.handed_prompts import HandedPrompt, HandedPrompts, Recomputed


class Decode:
    """Counts tokens as vLLM does. ``dead``: prefill engines from which it reads nothing."""

    def __init__(self, *dead: str) -> None:
        self.book = HandedPrompts()
        self.dead = dead
        self.read = self.found = self.computed = 0
        self.look()

    def take(self, prefill: str, num_tokens: int) -> HandedPrompt:
        prompt = self.book.hand(prefill, num_tokens)
        assert prompt is not None
        return prompt

    def begin(self, prompt: HandedPrompt) -> None:
        """Come to the first token of a prompt."""
        if prompt.prefill in self.dead:
            self.computed += prompt.num_tokens
        else:
            self.read += prompt.num_tokens - 1
            self.computed += 1
        self.book.answered(prompt)

    def look(self) -> Recomputed | None:
        answered = self.book.take_answered()
        name = "vllm:prompt_tokens_by_source_total"
        page = (
            f"# TYPE {name.removesuffix('_total')} counter\n"
            f'{name}{{engine="0",source="external_kv_transfer"}} {self.read}\n'
            f'{name}{{engine="0",source="local_cache_hit"}} {self.found}\n'
            f'{name}{{engine="0",source="local_compute"}} {self.computed}\n'
        )
        return self.book.judge(answered, Counts(page))


def test_nothing_is_noted_before_the_first_look() -> None:
    assert HandedPrompts().hand("prefill-0", 100) is None


@pytest.mark.parametrize("seed", range(20))
def test_an_engine_that_reads_all_is_never_blamed(seed: int) -> None:
    """Whenever it is looked at, and whatever others have it compute, read or find."""
    draw, decode = random.Random(seed), Decode()
    waiting: list[HandedPrompt] = []
    for _ in range(400):
        match draw.randrange(5):
            case 0:
                waiting.append(decode.take("prefill-0", draw.randrange(1, 3000)))
            case 1 | 2 if waiting:
                decode.begin(waiting.pop(draw.randrange(len(waiting))))
            case 3:
                decode.computed += draw.randrange(3000)
                decode.read += draw.randrange(3) * 50
            case _:
                assert decode.look() is None


@pytest.mark.parametrize("seed", range(20))
def test_a_prompt_that_was_computed_is_found_at_the_next_look(seed: int) -> None:
    draw, decode = random.Random(seed), Decode("prefill-1")
    for _ in range(draw.randrange(8)):
        for _ in range(5):
            decode.begin(decode.take("prefill-0", draw.randrange(100, 900)))
        assert decode.look() is None
    decode.begin(decode.take("prefill-1", 700))
    decode.begin(decode.take("prefill-0", 500))
    found = decode.look()
    assert found is not None
    assert 600 < found.num_tokens <= 700
    assert found.prefills == ["prefill-0", "prefill-1"]
    # It is told once.
    decode.begin(decode.take("prefill-0", 500))
    assert decode.look() is None


def test_prompts_under_way_hide_no_more_than_themselves() -> None:
    """Five always are, and of the others each second one is computed."""
    decode = Decode("prefill-1")
    waiting = [decode.take("prefill-0", 500) for _ in range(5)]
    for num_looks in range(10):
        for _ in range(5):
            waiting += [decode.take(name, 500) for name in ("prefill-0", "prefill-1")]
            decode.begin(waiting.pop(0))
            decode.begin(waiting.pop(0))
        if decode.look() is not None:
            assert num_looks <= 2
            return
    pytest.fail("nobody has found it")
