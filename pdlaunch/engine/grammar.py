"""Finds the tokens that a request's grammar allows next.

The state of a grammar depends on the output tokens alone, so any engine can rebuild it. Only rank 0
samples, so only rank 0 needs masks. A thread imports llguidance and reads the tokenizer (both for
the first grammar), and compiles each grammar: these take too long for the step loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pdlaunch.engine.models.attention import BoolArray
from pdlaunch.engine.models.step_inputs import upload, upload_array
from pdlaunch.engine.rows import Row

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Limit of compiled grammars that are kept while no request uses them: clients send the same few
# again and again. Each may take megabytes.
MAX_UNUSED = 32


class Grammars:
    """Compiles grammars, keeps them while requests use them, and masks the logits of rows."""

    def __init__(self, model_dir: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: dict[str, Future[LLMatcher]] = {}
        self._num_users: Counter[str] = Counter()
        # Grammars in ``_compiled`` that no request uses, the last used at the end.
        self._unused: dict[str, None] = {}
        self._thread = ThreadPoolExecutor(1, "grammars")

    def take(self, grammar: str) -> Future[LLMatcher]:
        """Return a matcher in the grammar's first state, kept until ``give_back``. The future
        raises ValueError if the grammar does not compile for the model's tokenizer.
        """
        if grammar not in self._compiled:
            self._compiled[grammar] = self._thread.submit(self._compile, grammar)
        self._unused.pop(grammar, None)
        self._num_users[grammar] += 1
        return self._compiled[grammar]

    def give_back(self, grammar: str) -> None:
        self._num_users[grammar] -= 1
        if self._num_users[grammar]:
            return
        del self._num_users[grammar]
        if self._compiled[grammar].cancel():
            del self._compiled[grammar]  # its compilation had not begun
            return
        self._unused[grammar] = None
        if len(self._unused) > MAX_UNUSED:
            oldest = next(iter(self._unused))
            del self._unused[oldest], self._compiled[oldest]

    def mask(self, logits: torch.Tensor, rows: Sequence[Row]) -> bool:
        """Set ``logits`` [num_rows, vocab_size] in place: forbidden tokens to minus infinity, rows
        whose output their grammar cannot follow to NaN. Returns False if no row has a grammar.
        """
        held = [index for index, row in enumerate(rows) if row.sampling.grammar]
        if not held:
            return False
        found = [self._allowed(rows[index]) for index in held]
        unknown = np.ones(self._vocab_size, dtype=np.bool_)
        forbidden = np.stack([unknown if bits is None else ~bits for bits in found])
        values = [float("nan") if bits is None else float("-inf") for bits in found]
        places = upload_array(np.array(held), logits.device)
        value = upload(values, logits.dtype, logits.device)[:, None]
        is_forbidden = upload_array(forbidden, logits.device)
        logits[places] = torch.where(is_forbidden, value, logits[places])
        return True

    def _allowed(self, row: Row) -> BoolArray | None:
        """Return whether each token may follow the row's output, [vocab_size]; None if the output
        breaks the grammar, or the grammar exceeds a limit of llguidance.
        """
        if row.matcher is None:
            # Compiled already: the scheduler seats a request only when its grammar is compiled.
            row.matcher = self._compiled[row.sampling.grammar].result(timeout=0).deep_copy()
        output = row.output[row.num_matched :].tolist()
        row.num_matched += len(output)
        row.matcher.consume_tokens(output)
        bits = np.frombuffer(row.matcher.compute_bitmask(), dtype=np.uint8)
        # After an error the mask allows only end tokens: the answer would look complete.
        if row.matcher.is_error():
            return None
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(np.bool_)

    def _compile(self, grammar: str) -> LLMatcher:
        import llguidance

        if self._tokenizer is None:
            self._tokenizer = llguidance.LLTokenizer(
                str(self._model_dir / "tokenizer.json"),
                n_vocab=self._vocab_size,
                eos_token=self._eos_token_ids,
            )
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if error := matcher.get_error():
            raise ValueError(error)
        return matcher
