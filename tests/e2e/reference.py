"""What the model says when transformers runs it alone, without any of our code: the truth of the end-to-end tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from duopool.engine.model_source import resolve_model

ROOT = Path(__file__).resolve().parents[2]

LENGTHS = (
    1,
    2,
    3,
    5,
    8,
    15,
    16,
    17,
    23,
    31,
    32,
    33,
    40,
    48,
    63,
    64,
    65,
    80,
    97,
    127,
    128,
    129,
    180,
    256,
    390,
    640,
    1500,
)
"""Prompt lengths in tokens: around blocks of 16 and around chunks of 128 and 512."""

MAX_TOKENS = 12


class Reference:
    """Greedy continuations, computed once each."""

    def __init__(self) -> None:
        folder = resolve_model("smollm2").folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.eval()
        text = (ROOT / "LICENSE").read_text() + (ROOT / "CONTRIBUTING.md").read_text() * 2
        self._words: list[int] = self.tokenizer(text)["input_ids"]
        self._cached = cache(self._greedy)

    def prompts(self) -> list[tuple[int, ...]]:
        """One prompt of each length, each from another place of a text."""
        starts = [7 * at for at in range(len(LENGTHS))]
        return [self.words(start, length) for start, length in zip(starts, LENGTHS, strict=True)]

    def words(self, start: int, length: int) -> tuple[int, ...]:
        """Tokens of the text, from its beginning again when it ends."""
        return tuple(self._words[(start + at) % len(self._words)] for at in range(length))

    def logprobs(self, prompt: tuple[int, ...]) -> torch.Tensor:
        """[T, V]: what the model says of the token behind each of the prompt's."""
        with torch.inference_mode():
            return self._model(torch.tensor([prompt])).logits[0].log_softmax(-1)

    def greedy(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The next MAX_TOKENS tokens, past any end of sequence."""
        return self._cached(prompt)

    def _greedy(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            answer = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return tuple(answer[0, len(prompt) :].tolist())
