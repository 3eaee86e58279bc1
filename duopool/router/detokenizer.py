"""Token ids to text, as they come.

Owns the tokens whose characters are not complete. A token is decoded behind the tokens before it, because decoders
join pieces by what stands before (spaces) and characters may be spread over tokens (bytes); text comes out only once it
cannot change any more, so a replacement character is never shown for half a character.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
NUM_CONTEXT_TOKENS = 6
"""Tokens of the prompt that the first output token is decoded behind."""
MAX_PENDING_TOKENS = 16
"""A character takes at most 4 bytes: pending for longer than this, the bytes are not text at all."""


class Detokenizer:
    """The text of one output; `decode` gives the text of a list of token ids, special tokens left out."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        special_ids: frozenset[int] = frozenset(),
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._special_ids = special_ids
        tail = prompt_token_ids[-2 * NUM_CONTEXT_TOKENS :]
        self._context = [token_id for token_id in tail if token_id not in special_ids][-NUM_CONTEXT_TOKENS:]
        self._context_text = self._text_of(self._context).rstrip(REPLACEMENT)
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these tokens."""
        return "".join(self._push(token_id) for token_id in token_ids if token_id not in self._special_ids)

    def finish(self) -> str:
        """The text that is left; half a character shows as a replacement character."""
        return self._take(self._new_text()) if self._pending else ""

    def _push(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._new_text()
        if not text or (text.endswith(REPLACEMENT) and len(self._pending) < MAX_PENDING_TOKENS):
            return ""
        return self._take(text)

    def _new_text(self) -> str:
        text = self._text_of(self._context + self._pending)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._text_of(self._pending)

    def _take(self, text: str) -> str:
        self._context, self._pending = self._pending, []
        self._context_text = self._text_of(self._context)
        return text

    def _text_of(self, token_ids: list[int]) -> str:
        return self._decode(token_ids) if token_ids else ""
