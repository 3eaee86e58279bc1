"""Which tokens a grammar allows next: constrained output, by llguidance.

A mask is a pure function of the grammar and of the tokens that are out, so it is the same on P and on D, after a resume
and after a preemption: a matcher that is not at hand is made again by replaying the tokens. Owns the matchers at hand.
Grammars are in llguidance's own form; the router has compiled and checked them.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import llguidance

log = logging.getLogger(__name__)

MAX_MATCHERS = 256
"""Requests whose state is kept between steps; those beyond replay their tokens at every step."""


class GrammarMasks:
    """The masks of one model's tokens. Not thread-safe: one step at a time."""

    def __init__(self, tokenizer: Future[llguidance.LLTokenizer]) -> None:
        self._tokenizer = tokenizer
        self._matchers: OrderedDict[tuple[str, tuple[int, ...]], llguidance.LLMatcher] = OrderedDict()

    @classmethod
    def from_folder(cls, folder: Path, *, vocab_size: int, eos_token_ids: Iterable[int]) -> GrammarMasks:
        """Read the folder's tokenizer beside what else the process does: it takes a good part of a second."""
        tokenizer: Future[llguidance.LLTokenizer] = Future()
        eos = sorted(eos_token_ids) or None

        def load() -> None:
            try:
                import llguidance

                text = _tokenizer_json(folder)
                tokenizer.set_result(llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=eos))
            except Exception as error:
                tokenizer.set_exception(error)

        threading.Thread(target=load, name="grammar-tokenizer", daemon=True).start()
        return cls(tokenizer)

    def wait(self) -> None:
        """Until the tokenizer is read, well or not, and its thread has ended."""
        self._tokenizer.exception()

    def allowed(self, grammar: str, output_token_ids: Sequence[int]) -> NDArray[np.bool_]:
        """[V]: the tokens that may follow. A grammar that is complete, or fails, allows the end of sequence alone."""
        output = tuple(output_token_ids)
        matcher = self._matchers.pop((grammar, output), None)
        if matcher is None and output:
            matcher = self._matchers.pop((grammar, output[:-1]), None)
            if matcher is not None:
                matcher.consume_token(output[-1])
        if matcher is None:
            import llguidance

            matcher = llguidance.LLMatcher(self._tokenizer.result(), grammar, log_level=0)
            matcher.consume_tokens(list(output))
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            # The first line is llguidance's own words; behind it comes the whole grammar.
            reason = matcher.get_error().partition("\n")[0]
            log.warning("a grammar ends its output after %d tokens: %s", len(output), reason)
        self._matchers[grammar, output] = matcher
        if len(self._matchers) > MAX_MATCHERS:
            self._matchers.popitem(last=False)
        return np.unpackbits(mask, bitorder="little", count=self._tokenizer.result().vocab_size).astype(np.bool_)


def _tokenizer_json(folder: Path) -> str:
    file = folder / "tokenizer.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    from transformers import AutoTokenizer

    text: str = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer.to_str()
    return text
