"""What one choice's client is shown: tokens as text, the first and the last message, and why it stopped.

Owns the text, the reason of the end, the times of the stages and the numbers for the client, and tells whoever watches.
Whether tokens count, and when a request has ended, is decided before they come here; unread messages wait in the call's
outbox.
"""

from __future__ import annotations

from collections.abc import Callable

from duopool.core.errors import DuopoolError
from duopool.core.handoff.request import Member, Phase, RequestState, Route, WorkerMessage
from duopool.core.messages import Accepted, BlocksReady, GenerationRequest, Joined, Reserved, Tokens
from duopool.core.types import FinishReason
from duopool.proto import inference_pb2 as pb
from duopool.proto.public_codec import started, token_chunk
from duopool.router.outbox import Outbox
from duopool.router.stage_times import StageTimes
from duopool.router.text_stream import TextStream
from duopool.router.tokenizer import Tokenizer
from duopool.router.waiting_room import Place
from duopool.router.watch import NOBODY, RequestRecord, Watch


class Delivery:
    """The client's side of one choice, from `started` to `finished`. Implements `request_life.Audience`."""

    def __init__(
        self,
        request: GenerationRequest,
        *,
        name: str,
        choice: int,
        text: TextStream,
        tokenizer: Tokenizer,
        outbox: Outbox,
        place: Place,
        watch: Watch = NOBODY,
        traceparent: str = "",
        clock: Callable[[], float],
    ) -> None:
        self.error: DuopoolError | None = None
        """Set when the client has left too many tokens unread."""
        self._num_cached_tokens = 0
        """Of the prompt, on the worker that computes it."""
        self._request = request
        self._stage = StageTimes(began_at=clock())
        self._name = name
        """The request's id as the client sees it."""
        self._choice = choice
        self._place = place
        self._watch = watch
        self._traceparent = traceparent
        """W3C trace context of the caller."""
        self._text = text
        self._tokenizer = tokenizer
        self._outbox = outbox
        self._clock = clock
        self._announce = choice == 0
        """Whether `started` is still to be sent; the first choice does it for all."""
        self._num_resumed_tokens = 0
        self._stop_reason: str | None = None
        self._finish_reason = FinishReason.STOP

    # ---- Audience ---------------------------------------------------------------------------------------------------

    def begin(self, output: tuple[int, ...]) -> bool:
        """Go on behind an earlier stream; True if its tokens were all but its last message."""
        self._watch.began()
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

    def seeks(self, state: RequestState) -> None:
        """Nothing to do: a route is looked for."""

    def routed(self, state: RequestState) -> None:
        if self._stage.routed_at is None:
            self._stage.routed_at = self._clock()

    def note(self, state: RequestState, message: WorkerMessage) -> None:
        """Remember what a message of the current attempt says beyond its effect on the transitions."""
        stage, route, now = self._stage, state.route, self._clock()
        match message:
            case Accepted():
                self._num_cached_tokens = message.num_cached_tokens
                self._start(route)
            case Reserved() if route is not None and route.prefill is None:
                self._num_cached_tokens = message.num_cached_tokens
                stage.reserved_at = now
                self._start(route)
            case BlocksReady():
                self._num_cached_tokens = message.num_cached_tokens
                stage.worker_queue_s, stage.prefill_s = message.queue_s, message.prefill_s
                if message.first_token is not None:
                    stage.ready_at = now
            case Tokens() if stage.reserved_at is not None and stage.first_token_at is None:
                stage.prefill_s = now - stage.reserved_at
            case Joined():
                stage.joined_at = now
                stage.transfer_s += message.transfer_s
                stage.num_pulled_blocks += message.num_pulled_blocks
                stage.num_pulled_bytes += message.num_pulled_bytes
            case _:
                pass

    def decodes(self) -> None:
        self._place.decodes()

    def show(self, state: RequestState, tokens: Tokens) -> bool:
        """Show tokens; True when nothing more is to be shown: a stop string is complete, or `error` is set."""
        stage, now = self._stage, self._clock()
        is_first = stage.last_token_at is None
        since = stage.began_at if stage.last_token_at is None else stage.last_token_at
        stage.last_token_at = now
        if is_first:
            stage.first_token_at = now
        self._place.emitted(len(tokens.token_ids))
        is_over = self._write(tokens, state.route)
        self._watch.shown(len(tokens.token_ids), now - since, is_first=is_first)
        return is_over

    def end(self, state: RequestState, phase: Phase, error: DuopoolError | None) -> None:
        """The last message of a request that is done, or the error of one that failed; nothing comes behind it."""
        self._place.leave(is_finished=phase is Phase.DONE)
        if error is not None:
            self._outbox.fail(error)
        elif phase is Phase.DONE:
            self._start(state.route)
            self._outbox.put(pb.GenerateResponse(finished=self._finished(state.route, state.attempt)))
        self._outbox.end_choice()
        self._watch.ended(self.record(state, error))

    # ---- messages ---------------------------------------------------------------------------------------------------

    def _start(self, route: Route | None) -> None:
        """Say where the request runs, once."""
        if not self._announce:
            return
        self._announce = False
        self._outbox.put(
            started(
                request_id=self._name,
                prompt_tokens=len(self._request.prompt_token_ids),
                cached_tokens=self._num_cached_tokens,
                prefill_worker=_name(route.prefill if route else None),
                decode_worker=_name(route.decode if route else None),
                seed=self._request.params.seed,
            )
        )

    def _write(self, tokens: Tokens, route: Route | None) -> bool:
        hidden = None if self._request.params.include_stop_str_in_output else tokens.stop_token_id
        num_taken, text = self._text.push(tokens.token_ids, hidden=hidden)
        self._stage.num_tokens += num_taken
        if self._text.stopped_by is None and tokens.finish_reason is not None:
            text += self._text.finish()
        self._note_end(tokens)
        self._start(route)
        chunk = token_chunk(
            index=tokens.index,
            token_ids=tokens.token_ids[:num_taken],
            text=text,
            choice=self._choice,
            logprobs=tokens.logprobs[:num_taken],
            prompt_logprobs=tokens.prompt_logprobs,
            spelling_of=self._tokenizer.spelling_of,
        )
        if not self._outbox.put(chunk, num_tokens=num_taken):
            self.error = self._outbox.error
            return True
        return self._text.stopped_by is not None

    def record(self, state: RequestState, error: DuopoolError | None) -> RequestRecord:
        """All that is known of the choice, at its end or on the way."""
        now, phase, route = self._clock(), state.phase, state.route
        num_prompt_tokens = len(self._request.prompt_token_ids)
        ends = {Phase.DONE: self._finish_reason.value, Phase.CANCELLED: "abort"}
        return RequestRecord(
            request_id=self._request.request_id,
            name=self._name,
            traceparent=self._traceparent,
            at=now,
            phase=phase,
            finish_reason=ends.get(phase, "error") if phase.is_final else "",
            error="" if error is None else type(error).__name__,
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=min(self._num_cached_tokens, num_prompt_tokens),
            num_output_tokens=self._stage.num_tokens,
            max_tokens=self._request.params.max_tokens,
            attempts=state.attempt,
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
                cached_tokens=min(self._num_cached_tokens, num_prompt_tokens),
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
