"""The public wire: protobuf messages of `inference.proto` to and from core values.

Owns the defaults of absent fields and the reading of raw requests. Range checks are `SamplingParams.check()`'s and
admission's; nothing here looks at a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.internal.decoder import _DecodeVarint
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from duopool.core.errors import InvalidRequest
from duopool.core.messages import WorkerInfo, WorkerLoad
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import TokenLogprob
from duopool.proto import inference_pb2 as pb

CHAT_ROLES = ("system", "user", "assistant", "tool")
SpellingOf = Callable[[int], tuple[str, bytes]]
"""Text and bytes of a single token."""

_DEFAULTS = SamplingParams()
_OPTIONAL_FIELDS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "prompt_logprobs",
)


def parse_request(data: bytes, kind: Descriptor) -> Any:
    """The message of a call's request; InvalidRequest names the string that is not UTF-8, if that is what is wrong."""
    try:
        return GetMessageClass(kind).FromString(data)
    except DecodeError as error:
        field = _field_without_utf8(data, kind)
        if field is None:
            raise InvalidRequest("request", f"is not a {kind.full_name} message") from error
        raise InvalidRequest(field, "must be valid UTF-8") from error


def sampling_params(message: pb.SamplingParams, *, seed: int) -> SamplingParams:
    """Sampling parameters with vLLM's defaults; `seed` is taken when the message names none. Not checked."""
    given = {name: getattr(message, name) for name in _OPTIONAL_FIELDS if message.HasField(name)}
    return SamplingParams(
        **given,
        seed=message.seed if message.HasField("seed") else seed,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop_str_in_output=message.include_stop_str_in_output,
    )


def max_tokens(message: pb.SamplingParams) -> int:
    """What `sampling_params` will say of it, without the rest."""
    return message.max_tokens if message.HasField("max_tokens") else _DEFAULTS.max_tokens


def num_choices(message: pb.SamplingParams) -> int:
    """`n`, not checked."""
    return message.n if message.HasField("n") else 1


def chat_messages(chat: pb.ChatMessages) -> list[dict[str, str]]:
    """Messages as chat templates take them. InvalidRequest for none, and for a role that no template knows."""
    if not chat.messages:
        raise InvalidRequest("chat.messages", "must not be empty")
    for place, message in enumerate(chat.messages):
        if message.role not in CHAT_ROLES:
            known = ", ".join(CHAT_ROLES)
            raise InvalidRequest(f"chat.messages[{place}].role", f"must be one of {known}, got {message.role[:64]!r}")
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def started(
    *, request_id: str, prompt_tokens: int, cached_tokens: int, prefill_worker: str, decode_worker: str, seed: int
) -> pb.GenerateResponse:
    """The first message of a stream."""
    return pb.GenerateResponse(
        started=pb.Started(
            request_id=request_id,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            prefill_worker=prefill_worker,
            decode_worker=decode_worker,
            seed=seed,
        )
    )


def token_chunk(
    *,
    index: int,
    token_ids: Sequence[int],
    text: str,
    choice: int,
    logprobs: Iterable[TokenLogprob],
    prompt_logprobs: Iterable[TokenLogprob],
    spelling_of: SpellingOf,
) -> pb.GenerateResponse:
    """The tokens of one step."""
    return pb.GenerateResponse(
        tokens=pb.TokenChunk(
            index=index,
            token_ids=token_ids,
            text=text,
            choice=choice,
            logprobs=[_logprob(entry, spelling_of) for entry in logprobs],
            prompt_logprobs=[_logprob(entry, spelling_of) for entry in prompt_logprobs],
        )
    )


def worker_state(info: WorkerInfo, load: WorkerLoad, state: str) -> pb.WorkerState:
    """One row of the cluster's state."""
    return pb.WorkerState(
        worker_id=info.worker_id,
        role=info.role,
        address=info.address,
        state=state,
        node_id=info.node_id,
        pid=info.pid,
        waiting=load.num_waiting,
        running=load.num_running,
        blocks=info.num_blocks,
        free_blocks=load.num_free_blocks,
        cached_blocks=load.num_cached_blocks,
        leases=load.num_leases,
        computed_tokens=load.num_computed_tokens,
        pulled_blocks=load.num_pulled_blocks,
        preemptions=load.num_preemptions,
        step_s=load.step_s,
        incarnation=info.incarnation,
    )


def _logprob(entry: TokenLogprob, spelling_of: SpellingOf) -> pb.Logprob:
    top = [_entry(token_id, logprob, rank, spelling_of) for rank, (token_id, logprob) in enumerate(entry.top, 1)]
    whole = _entry(entry.token_id, entry.logprob, entry.rank, spelling_of)
    whole.top.extend(top)
    return whole


def _entry(token_id: int, logprob: float, rank: int, spelling_of: SpellingOf) -> pb.Logprob:
    text, token_bytes = spelling_of(token_id)
    return pb.Logprob(token_id=token_id, logprob=logprob, rank=rank, text=text, token_bytes=token_bytes)


def _field_without_utf8(data: bytes, kind: Descriptor, path: str = "") -> str | None:
    """Path of the first string field whose bytes are not UTF-8; None if there is none, or no telling."""
    fields = {field.number: field for field in kind.fields}
    counts: dict[int, int] = {}
    at = 0
    try:
        while at < len(data):
            tag, at = _DecodeVarint(data, at)
            number, wire_type = tag >> 3, tag & 7
            if wire_type != 2:
                at = _DecodeVarint(data, at)[1] if wire_type == 0 else at + {1: 8, 5: 4}[wire_type]
                continue
            size, at = _DecodeVarint(data, at)
            piece, at = data[at : at + size], at + size
            field = fields.get(number)
            if field is None:
                continue
            place = counts[number] = counts.get(number, -1) + 1
            name: str = path + field.name + (f"[{place}]" if field.is_repeated else "")
            if field.type == FieldDescriptor.TYPE_STRING:
                piece.decode()
            elif field.type == FieldDescriptor.TYPE_MESSAGE:
                found = _field_without_utf8(piece, field.message_type, f"{name}.")
                if found is not None:
                    return found
    except UnicodeDecodeError:
        return name
    except (KeyError, IndexError, DecodeError):
        return None
    return None
