"""The text of one choice: detokenised, looked through for stop strings, in step with its tokens.

Owns the order of the two and the rule that stop strings count only behind `min_tokens`. A function of the tokens alone:
a continued stream replays the tokens it has and goes on where the text stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from duopool.core.sampling_params import SamplingParams
from duopool.router.detokenizer import Detokenizer
from duopool.router.stop_strings import StopStrings


class TextStream:
    """Feed it tokens, take text; `stopped_by` is set once a stop string is complete."""

    def __init__(self, detokenizer: Detokenizer, params: SamplingParams) -> None:
        self._detokenizer = detokenizer
        self._stop = StopStrings(params.stop, include_in_output=params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0

    @property
    def stopped_by(self) -> str | None:
        return self._stop.matched

    def push(self, token_ids: Sequence[int], *, hidden: int | None = None) -> tuple[int, str]:
        """(tokens taken, text): fewer tokens than given when a stop string ends the output among them.

        The text of a last token `hidden` (the stop token) is not shown.
        """
        texts = []
        for taken, token_id in enumerate(token_ids):
            self._num_tokens += 1
            shown = () if token_id == hidden and taken == len(token_ids) - 1 else (token_id,)
            text = self._detokenizer.push(shown)
            texts.append(
                self._stop.pass_through(text) if self._num_tokens <= self._min_tokens else self._stop.push(text)
            )
            if self.stopped_by is not None:
                return taken + 1, "".join(texts)
        return len(token_ids), "".join(texts)

    def finish(self) -> str:
        """What is left when the output ends for another reason than a stop string."""
        if self.stopped_by is not None:
            return ""
        text = self._stop.push(self._detokenizer.finish())
        return text if self.stopped_by is not None else text + self._stop.finish()
