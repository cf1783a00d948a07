"""Finds which tokens a request's grammar allows next; only output tokens are needed.

So any engine can rebuild the state of the grammar: for decode, after a preemption or after a death.
Only rank 0 samples, so only rank 0 needs masks. Importing llguidance, reading the tokenizer (both
for the first grammar) and compiling take too long for the step loop, so a thread does them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pdlaunch.engine.device_copies import upload, upload_array
from pdlaunch.engine.models.attention import BoolArray
from pdlaunch.engine.rows import Row

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Most that stay without a request: clients send the same few grammars again and again. Each may
# take megabytes.
MAX_UNUSED = 32


class Grammars:
    """Compiles grammars, keeps those of requests, and follows those of rows."""

    def __init__(self, model_dir: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: dict[str, Future[LLMatcher]] = {}
        self._num_users: Counter[str] = Counter()
        self._unused: dict[str, None] = {}
        """Those of ``_compiled`` without a user, the latest last."""
        self._thread = ThreadPoolExecutor(1, "grammars")

    def take(self, grammar: str) -> Future[LLMatcher]:
        """Return the grammar's first state, which stays until the user gives the grammar back.

        ValueError: it does not fit the model's tokenizer.
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
            del self._compiled[grammar]  # Its compilation had not begun, and nobody waits for it.
            return
        self._unused[grammar] = None
        if len(self._unused) > MAX_UNUSED:
            oldest = next(iter(self._unused))
            del self._unused[oldest], self._compiled[oldest]

    def mask(self, logits: torch.Tensor, rows: Sequence[Row]) -> bool:
        """Set the logits of forbidden tokens to minus infinity, in place; a row whose grammar
        cannot follow its output to NaN. [num_rows, vocab_size]. False: no row has a grammar.
        """
        held = [index for index, row in enumerate(rows) if row.sampling.grammar]
        if not held:
            return False
        found = [self._allowed(rows[index]) for index in held]
        nobody_knows = np.ones(self._vocab_size, dtype=np.bool_)
        forbidden = np.stack([nobody_knows if bits is None else ~bits for bits in found])
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
            # It is there: a request is seated once its grammar is compiled, and keeps it.
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
