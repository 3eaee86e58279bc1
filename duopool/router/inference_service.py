"""The `Inference` service: gRPC's face of `generation.py`. Handlers are called through `rpc.py`."""

from __future__ import annotations

from typing import Any

from duopool.core.errors import InvalidRequest
from duopool.proto import inference_pb2 as pb
from duopool.proto.bearer import HEADER
from duopool.proto.public_codec import chat_messages, max_tokens, num_choices, sampling_params
from duopool.router.ask import Ask, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from duopool.router.generation import Generation
from duopool.router.guide import ANY_OBJECT, Guide, GuideKind, json_guide
from duopool.router.public_access import PublicAccess
from duopool.router.traces import TRACEPARENT


class InferenceService:
    def __init__(self, generation: Generation, access: PublicAccess) -> None:
        self._generation = generation
        self._access = access

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        generation = self._generation
        generation.check_model(request.model)
        time_left_s, priority = context.time_remaining(), request.priority
        generation.check_room(max_tokens(request.sampling), time_left_s=time_left_s, priority=priority)
        ask = Ask(
            tenant=self._access.tenant(dict(context.invocation_metadata() or ()).get(HEADER)),
            model=request.model,
            prompts=(_prompt(request),),
            params=sampling_params(request.sampling, seed=generation.draw_seed()),
            guide=_guide(request),
            num_choices=num_choices(request.sampling),
            request_id=request.request_id,
            cache_salt=request.cache_salt,
            traceparent=_traceparent(context),
            resume_from=_resumed(request),
            priority=priority,
        )
        async with generation.open(ask, time_left_s=time_left_s) as stream:
            while (item := await stream.outbox.take()) is not None:
                message, num_tokens = item
                await context.write(message)
                stream.outbox.written(num_tokens)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        self._generation.check_model(request.model)
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        token_ids = await self._generation.encode(_prompt(request, add_special_tokens=special))
        return pb.TokenizeResponse(token_ids=token_ids, max_model_len=self._generation.limits().max_model_len)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        self._generation.check_model(request.model)
        text = await self._generation.decode(list(request.token_ids), field="token_ids")
        return pb.DetokenizeResponse(text=text)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        model_id = self._generation.model_id
        if not self._generation.pools.members:
            return pb.ListModelsResponse(models=[pb.Model(id=model_id)])
        limits = self._generation.limits()
        model = pb.Model(id=model_id, max_model_len=limits.max_model_len, vocab_size=limits.vocab_size)
        return pb.ListModelsResponse(models=[model])


def _prompt(request: pb.GenerateRequest | pb.TokenizeRequest, *, add_special_tokens: bool = True) -> Prompt:
    match request.WhichOneof("prompt"):
        case "text":
            return TextPrompt(text=request.text, field="text", add_special_tokens=add_special_tokens)
        case "chat":
            return ChatPrompt(messages=tuple(chat_messages(request.chat)), field="chat.messages")
        case "token_ids" if isinstance(request, pb.GenerateRequest):
            return TokenPrompt(token_ids=tuple(request.token_ids.ids), field="token_ids")
        case _:
            known = "text and chat" if isinstance(request, pb.TokenizeRequest) else "text, chat and token_ids"
            raise InvalidRequest("prompt", f"one of {known} must be set")


def _guide(request: pb.GenerateRequest) -> Guide | None:
    """What the outputs must look like."""
    guide, kind = request.guide, request.guide.WhichOneof("kind")
    field = f"guide.{kind}"
    match kind:
        case "json_schema":
            return Guide(kind=GuideKind.JSON_SCHEMA, source=guide.json_schema, field=field)
        case "json_object":
            return json_guide(ANY_OBJECT, field=field) if guide.json_object else None
        case "regex":
            return Guide(kind=GuideKind.REGEX, source=guide.regex, field=field)
        case "grammar":
            return Guide(kind=GuideKind.LARK, source=guide.grammar, field=field)
        case _:
            return None


def _resumed(request: pb.GenerateRequest) -> tuple[tuple[int, ...], ...]:
    """What each choice has delivered already; nothing for a call that begins."""
    number, one, several = num_choices(request.sampling), request.resume_from.ids, request.resume_choices
    if one and number != 1:
        raise InvalidRequest("resume_from", f"works with n = 1 only, got n = {number}; resume_choices is for more")
    if several and (one or len(several) != number):
        raise InvalidRequest("resume_choices", f"must have an entry for each of n = {number} choices, and none besides")
    return (tuple(one),) if one else tuple(tuple(choice.ids) for choice in several)


def _traceparent(context: Any) -> str:
    return next((str(value) for key, value in context.invocation_metadata() or () if key == TRACEPARENT), "")
