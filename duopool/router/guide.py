"""What an output must look like, compiled to the grammar that workers apply token by token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import llguidance

from duopool.core.errors import InvalidRequest
from duopool.core.sampling_params import MAX_GRAMMAR_CHARS
from duopool.router.tokenizer import Tokenizer

_WHITESPACE = r"( |\n[ \t]{0,16})?"
"""Between the parts of JSON. Bounded: a small model would go on with blanks for ever."""


class GuideKind(StrEnum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "grammar"
    """A Lark grammar, as llguidance reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    kind: GuideKind
    source: str
    """JSON for a schema."""
    field: str
    """How the face calls it, for errors."""


class GuideCompiler:
    """Compiles for one tokenizer; may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._text = tokenizer.as_json

    def compile(self, guide: Guide) -> str:
        """The grammar in llguidance's form. InvalidRequest names the field and says what is wrong with it."""
        if len(guide.source) > MAX_GRAMMAR_CHARS // 2:
            raise InvalidRequest(
                guide.field, f"at most {MAX_GRAMMAR_CHARS // 2} characters are allowed, got {len(guide.source)}"
            )
        grammar = self._grammar(guide)
        is_wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        if is_wrong:
            raise InvalidRequest(guide.field, f"cannot be compiled: {messages[0].splitlines()[0]}")
        return grammar

    def _grammar(self, guide: Guide) -> str:
        matcher = llguidance.LLMatcher
        try:
            match guide.kind:
                case GuideKind.JSON_SCHEMA:
                    return str(
                        matcher.grammar_from_json_schema(guide.source, overrides={"whitespace_pattern": _WHITESPACE})
                    )
                case GuideKind.REGEX:
                    return str(matcher.grammar_from_regex(guide.source))
                case GuideKind.LARK:
                    return str(matcher.grammar_from_lark(guide.source))
        except ValueError as error:
            raise InvalidRequest(guide.field, f"cannot be read: {error}") from error

    @cached_property
    def _tokenizer(self) -> Any:
        return llguidance.LLTokenizer(self._text())


ANY_OBJECT = {"type": "object"}


def json_guide(schema: Any, *, field: str) -> Guide:
    """`schema` as JSON came in: an object, or true for anything."""
    return Guide(kind=GuideKind.JSON_SCHEMA, source=json.dumps(schema), field=field)


def choice_guide(choices: Sequence[str], *, field: str) -> Guide:
    """One of these texts."""
    if not choices:
        raise InvalidRequest(field, "must not be empty")
    source = "start: " + " | ".join(map(json.dumps, choices))
    return Guide(kind=GuideKind.LARK, source=source, field=field)
