"""What one choice's client is shown: tokens as text, the first and the last message, and why it stopped.

Owns the text, the reason of the end and the numbers for the client. Whether tokens count, and when a request has ended,
is decided before they come here; unread messages wait in the call's outbox.
"""

from __future__ import annotations

from collections.abc import Callable

from duopool.core.errors import DuopoolError
from duopool.core.handoff.request import Member, Phase, Route
from duopool.core.messages import GenerationRequest, Tokens
from duopool.core.types import FinishReason
from duopool.proto import inference_pb2 as pb
from duopool.proto.public_codec import started, token_chunk
from duopool.router.outbox import Outbox
from duopool.router.stage_times import StageTimes
from duopool.router.text_stream import TextStream
from duopool.router.tokenizer import Tokenizer
from duopool.router.watch import RequestRecord


class Delivery:
    """The client's side of one choice, from `started` to `finished`."""

    def __init__(
        self,
        request: GenerationRequest,
        stage: StageTimes,
        *,
        name: str,
        choice: int,
        text: TextStream,
        tokenizer: Tokenizer,
        outbox: Outbox,
        clock: Callable[[], float],
    ) -> None:
        self.num_cached_tokens = 0
        """Of the prompt, on the worker that computes it."""
        self.error: DuopoolError | None = None
        """Set when the client has left too many tokens unread."""
        self._request = request
        self._stage = stage
        self._name = name
        """The request's id as the client sees it."""
        self._choice = choice
        self._text = text
        self._tokenizer = tokenizer
        self._outbox = outbox
        self._clock = clock
        self._announce = choice == 0
        """Whether `started` is still to be sent; the first choice does it for all."""
        self._num_resumed_tokens = 0
        self._stop_reason: str | None = None
        self._finish_reason = FinishReason.STOP

    def resume(self, output: tuple[int, ...]) -> bool:
        """Go on behind an earlier stream; True if its tokens were all but its last message."""
        self._num_resumed_tokens = len(output)
        self._text.push(output)
        params = self._request.params
        if not output:
            return False
        if self._text.stopped_by is not None:
            self._stop_reason = self._text.stopped_by
            return True
        if len(output) > params.min_tokens and output[-1] in params.stop_token_ids:
            self._stop_reason = str(output[-1])
            return True
        if len(output) > params.min_tokens and not params.ignore_eos and output[-1] in self._tokenizer.eos_token_ids:
            return True
        self._finish_reason = FinishReason.LENGTH
        return len(output) >= params.max_tokens

    def start(self, route: Route | None) -> None:
        """Say where the request runs, once."""
        if not self._announce:
            return
        self._announce = False
        self._outbox.put(
            started(
                request_id=self._name,
                prompt_tokens=len(self._request.prompt_token_ids),
                cached_tokens=self.num_cached_tokens,
                prefill_worker=_name(route.prefill if route else None),
                decode_worker=_name(route.decode if route else None),
                seed=self._request.params.seed,
            )
        )

    def show(self, tokens: Tokens, route: Route | None) -> bool:
        """Show tokens; True when nothing more is to be shown: a stop string is complete, or `error` is set."""
        stage = self._stage
        stage.last_token_at = self._clock()
        if stage.first_token_at is None:
            stage.first_token_at = stage.last_token_at
        hidden = None if self._request.params.include_stop_str_in_output else tokens.stop_token_id
        num_taken, text = self._text.push(tokens.token_ids, hidden=hidden)
        stage.num_tokens += num_taken
        if self._text.stopped_by is None and tokens.finish_reason is not None:
            text += self._text.finish()
        self._note_end(tokens)
        self.start(route)
        chunk = token_chunk(
            index=tokens.index,
            token_ids=tokens.token_ids[:num_taken],
            text=text,
            choice=self._choice,
            logprobs=tokens.logprobs[:num_taken],
            prompt_logprobs=tokens.prompt_logprobs,
            text_of=self._tokenizer.text_of,
        )
        if not self._outbox.put(chunk, num_tokens=num_taken):
            self.error = self._outbox.error
            return True
        return self._text.stopped_by is not None

    def finish(self, route: Route | None, *, attempts: int) -> None:
        """The last message of a request that is done."""
        self.start(route)
        self._outbox.put(pb.GenerateResponse(finished=self._finished(route, attempts)))

    def fail(self, error: DuopoolError) -> None:
        self._outbox.fail(error)

    def close(self) -> None:
        """Nothing more will come."""
        self._outbox.end_choice()

    def record(
        self, phase: Phase, route: Route | None, *, attempts: int, error: DuopoolError | None, traceparent: str
    ) -> RequestRecord:
        """All that is known of the choice, at its end or on the way."""
        now = self._clock()
        num_prompt_tokens = len(self._request.prompt_token_ids)
        ends = {Phase.DONE: self._finish_reason.value, Phase.CANCELLED: "abort"}
        return RequestRecord(
            request_id=self._request.request_id,
            name=self._name,
            traceparent=traceparent,
            at=now,
            phase=phase,
            finish_reason=ends.get(phase, "error") if phase.is_final else "",
            error="" if error is None else type(error).__name__,
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=min(self.num_cached_tokens, num_prompt_tokens),
            num_output_tokens=self._stage.num_tokens,
            max_tokens=self._request.params.max_tokens,
            attempts=attempts,
            prefill_worker=_name(route.prefill if route else None),
            decode_worker=_name(route.decode if route else None),
            times=self._stage.as_message(now),
        )

    def _note_end(self, tokens: Tokens) -> None:
        """Remember why the output ends, if it does; a stop string counts before the worker's reason."""
        if self._text.stopped_by is not None:
            self._stop_reason = self._text.stopped_by
            self._finish_reason = FinishReason.STOP
        elif tokens.finish_reason is not None:
            self._finish_reason = tokens.finish_reason
            if tokens.stop_token_id in self._request.params.stop_token_ids:
                self._stop_reason = str(tokens.stop_token_id)

    def _finished(self, route: Route | None, attempts: int) -> pb.Finished:
        num_prompt_tokens = len(self._request.prompt_token_ids)
        finished = pb.Finished(
            finish_reason=self._finish_reason.value,
            usage=pb.Usage(
                prompt_tokens=num_prompt_tokens,
                completion_tokens=self._num_resumed_tokens + self._stage.num_tokens,
                cached_tokens=min(self.num_cached_tokens, num_prompt_tokens),
            ),
            times=self._stage.as_message(self._clock()),
            prefill_worker=_name(route.prefill if route else None),
            decode_worker=_name(route.decode if route else None),
            attempts=attempts,
            choice=self._choice,
        )
        if self._stop_reason is not None:
            finished.stop_reason = self._stop_reason
        return finished


def _name(member: Member | None) -> str:
    return "" if member is None else member.worker_id
