"""What a caller asks for, as a value: the same whether it came over gRPC or HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from duopool.core.sampling_params import SamplingParams
from duopool.router.guide import Guide
from duopool.router.public_access import Tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompt:
    text: str
    field: str
    """How the face calls it, for errors."""
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompt:
    token_ids: tuple[int, ...]
    field: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """Messages for the model's chat template."""

    messages: tuple[Mapping[str, Any], ...]
    field: str
    tools: tuple[Mapping[str, Any], ...] = ()
    """As JSON, for a template that has a place for them."""

    @property
    def num_chars(self) -> int:
        """Characters of the contents: the least that the template makes of them."""
        return sum(len(message.get("content") or "") for message in self.messages)


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One call: every prompt gets `num_choices` outputs."""

    tenant: Tenant
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    model: str = ""
    """Empty means the one that is served."""
    guide: Guide | None = None
    """What the outputs must look like."""
    num_choices: int = 1
    takes_all_room: bool = False
    """Go on as long as prompt and output fit, whatever `params.max_tokens` says."""
    request_id: str = ""
    """An alias of the client's own."""
    cache_salt: bytes = b""
    traceparent: str = ""
    """W3C trace context of the caller; carried into the request's record."""
    resume_from: tuple[tuple[int, ...], ...] = ()
    """Tokens that an earlier, broken stream delivered, of each choice; none for a new call."""
    priority: int = 0
    """Lower values go first wherever requests wait."""
