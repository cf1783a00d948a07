"""Grammars and the log-probabilities of prompts, with a real model and step loop."""

import re
from collections.abc import Sequence
from concurrent.futures import Executor, Future, wait
from pathlib import Path

import pytest
import torch
from llguidance import LLMatcher
from transformers import AutoModelForCausalLM

from pdlaunch.engine import grammar
from pdlaunch.engine.lifecycle import LOST_GRAMMAR
from pdlaunch.protocol.engine import AddRequest, RequestFinished, SamplingParams, Tokens, ToRank
from pdlaunch.protocol.kv_params import TokenOutput
from tests.e2e.tiny_models import make_tiny_model
from tests.engine.fake_engine import FakeEngine
from tests.engine.real_steps import make_spec
from tests.engine.test_async_scheduling import Engine, token_ids

EOS = 1
REGEX = r"[a-f]{3,9}(-[0-9]{2,4}){1,3}\."
GRAMMAR = f"start: /{REGEX}/"
PROMPT = [*range(40, 61)]
# In steps of different sizes, and also where forbidden tokens could be drawn by their weights.
SAMPLING = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1e300, "seed": 4},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama; each of its tokens is a byte, but for the end of an answer."""
    torch.set_num_threads(1)
    return make_tiny_model("llama", tmp_path_factory.mktemp("models"))


def make_engine(directory: Path, **changes: object) -> Engine:
    engine = Engine(make_spec(directory, **changes))
    engine.runner.grammars.take(GRAMMAR).result()
    return engine


def request(
    name: str = "a/0", prompt: list[int] = PROMPT, output: Sequence[int] = (), **sampling: object
) -> AddRequest:
    known = [TokenOutput(token_id=token_id) for token_id in output]
    fields = {"max_tokens": 40, "stop_token_ids": (EOS,), "eos_token_ids": (EOS,)} | sampling
    params = SamplingParams(**fields)
    return AddRequest(request_id=name, prompt_token_ids=prompt, sampling=params, output=known)


def text_of(ids: list[int]) -> str:
    from tests.e2e.tiny_models import make_tokenizer

    assert ids[-1] == EOS
    return make_tokenizer().decode(ids[:-1])


@pytest.mark.parametrize("sampling", SAMPLING)
def test_an_answer_fits_and_goes_on_behind_any_of_its_tokens(directory: Path, sampling) -> None:
    """As a decode engine, and one that takes over from it, have to."""
    engine = make_engine(directory, async_scheduling=True)
    reason, tokens = engine.run({0: [request(grammar=GRAMMAR, **sampling)]})["a/0"]
    whole = token_ids(tokens)
    assert reason == "stop"
    assert re.fullmatch(REGEX, text_of(whole))
    arrivals: dict[int, list[ToRank]] = {
        at: [request(f"b{at}/0", output=whole[:at], grammar=GRAMMAR, **sampling)]
        for at in range(1, len(whole))
    }
    found = engine.run(arrivals)
    for at in range(1, len(whole)):
        assert whole[:at] + token_ids(found[f"b{at}/0"][1]) == whole


def test_neighbours_in_a_batch_keep_their_tokens(directory: Path) -> None:
    engine = make_engine(directory)
    messages = [
        request("free/0", temperature=0.0),
        request("held/0", PROMPT[:9], temperature=0.0, grammar=GRAMMAR, num_top_logprobs=3),
        request("drawn/0", PROMPT[:5], temperature=0.9, seed=7),
    ]
    alone = {name: got for one in messages for name, got in engine.run({0: [one]}).items()}
    engine.server.told.clear()
    together = engine.run({0: messages})
    for name, (reason, tokens) in alone.items():
        assert (together[name][0], token_ids(together[name][1])) == (reason, token_ids(tokens))
    # What is told of a token is its probability among those that the grammar allows.
    first = together["held/0"][1][0]
    assert first.token_id == first.top_logprobs[0][0]
    assert all(chr(33 + token_id) in "abcdef" for token_id, _ in first.top_logprobs)


@pytest.mark.parametrize(
    ("text", "output", "error"),
    [
        (GRAMMAR, [EOS + 1], LOST_GRAMMAR),
        (GRAMMAR, [20, 20], LOST_GRAMMAR),
        ("start: /(/", [], "the grammar cannot be used"),
    ],
)
def test_a_grammar_that_cannot_be_used_or_that_the_output_breaks_is_an_error(
    directory: Path, text: str, output: list[int], error: str
) -> None:
    engine = make_engine(directory)
    wait([engine.runner.grammars.take(text)])
    engine.run({0: [request(output=output, grammar=text)]})
    (end,) = [item for item in engine.server.told if isinstance(item, RequestFinished)]
    assert (end.reason, (end.error or "")[: len(error)]) == ("error", error)


class Inline(Executor):
    def submit(self, fn, /, *args, **kwargs):
        future: Future[object] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def test_no_step_compiles_a_grammar(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more grammars than are kept without a request, some of preempted requests."""
    monkeypatch.setattr(grammar, "ThreadPoolExecutor", lambda *_: Inline())
    engine = Engine(make_spec(directory, max_num_seqs=6, max_model_len=200))
    compiled: list[str] = []
    compile_grammar = engine.runner.grammars._compile

    def count(text: str) -> LLMatcher:
        compiled.append(text)
        return compile_grammar(text)

    monkeypatch.setattr(engine.runner.grammars, "_compile", count)
    texts = [f"start: /[a-f]{{{number + 60}}}/" for number in range(grammar.MAX_UNUSED + 8)]
    found = engine.run(
        {0: [request(f"{at}/0", grammar=text, max_tokens=150) for at, text in enumerate(texts)]}
    )
    assert engine.scheduler.requests.counts["num_preemptions"] > 0
    assert compiled == texts
    for at in range(len(texts)):
        reason, tokens = found[f"{at}/0"]
        assert (reason, len(tokens)) == ("stop", at + 61)
    # The latest are still there, and the first ones are not.
    engine.run({0: [request("again/0", grammar=texts[-1]), request("first/0", grammar=texts[0])]})
    assert compiled == [*texts, texts[0]]


def test_a_request_runs_once_its_grammar_is_compiled() -> None:
    """One that ends before leaves nothing to compile."""
    submitted: list[Future[object]] = []

    class Held(Executor):
        def submit(self, fn, /, *args, **kwargs):
            submitted.append(Future())
            return submitted[-1]

    engine = FakeEngine()
    requests = engine.scheduler.requests
    requests.grammars._thread = Held()
    for name, text in (("a", "one"), ("b", "two"), ("c", "two"), ("d", "")):
        engine.add(name, PROMPT[:9], sampling=SamplingParams(max_tokens=2, grammar=text))
    engine.run()
    assert engine.finished.keys() == {"d"}
    requests.abort("b")
    assert not submitted[1].cancelled()
    requests.abort("c")
    assert submitted[1].cancelled()
    submitted[0].set_result(None)
    engine.run()
    assert engine.finished["a"].reason == "length"
    assert len(submitted) == 2


def test_log_probabilities_of_prompts_are_those_of_the_model(directory: Path) -> None:
    """In chunks, also when the prompt is cached, is preempted or comes with its first token."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    engine = make_engine(directory, max_num_batched_tokens=16)
    prompts = {"a/0": PROMPT, "b/0": PROMPT, "c/0": [*PROMPT, 9, 8, 7], "d/0": [5]}
    messages = [request(name, prompt, num_prompt_logprobs=2) for name, prompt in prompts.items()]
    resumed = request("e/0", output=[7, 8], num_prompt_logprobs=2)
    prompts["e/0"] = PROMPT
    engine.run({0: messages[:1], 9: [*messages[1:], request("other/0")], 12: [resumed]})
    told: dict[str, list[TokenOutput]] = {}
    for item in engine.server.told:
        if isinstance(item, Tokens | RequestFinished) and item.prompt:
            assert item.request_id not in told
            told[item.request_id] = item.prompt
    assert told.keys() == prompts.keys()
    for name, prompt in prompts.items():
        first, *scored = told[name]
        assert first == TokenOutput(token_id=prompt[0])
        assert [token.token_id for token in scored] == prompt[1:]
        with torch.inference_mode():
            logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for token, expected in zip(scored, logprobs, strict=False):
            assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-4)
            best = expected.topk(2)
            assert [one for one, _ in token.top_logprobs] == best.indices.tolist()
