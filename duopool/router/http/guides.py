"""What a request says its output must look like: `response_format`, and vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from duopool.core.errors import InvalidRequest
from duopool.router.guide import ANY_OBJECT, Guide, GuideKind, choice_guide, json_guide


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: str | None = None
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")


class ResponseFormat(BaseModel):
    """OpenAI's; `regex` and `grammar` are extensions."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str = Field(description="text, json_object, json_schema, regex or grammar")
    json_schema: JsonSchemaFormat | None = None
    regex: str | None = None
    grammar: str | None = Field(default=None, description="A Lark grammar, as llguidance reads it.")


class StructuredOutputs(BaseModel):
    """vLLM's; at most one may be set."""

    model_config = ConfigDict(strict=True, extra="ignore")

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


def read_guide(response_format: ResponseFormat | None, structured: StructuredOutputs | None) -> Guide | None:
    """The one guide that is asked for. InvalidRequest when there are two."""
    guides = [*_of_format(response_format), *_of_structured(structured)]
    if len(guides) > 1:
        raise InvalidRequest(guides[1].field, f"cannot be combined with {guides[0].field}")
    return guides[0] if guides else None


def _of_format(given: ResponseFormat | None) -> list[Guide]:
    if given is None or given.type == "text":
        return []
    field = f"response_format.{given.type}"
    match given.type:
        case "json_object":
            return [json_guide(ANY_OBJECT, field=field)]
        case "json_schema" if given.json_schema is not None:
            return [json_guide(given.json_schema.schema_, field=f"{field}.schema")]
        case "regex" if given.regex is not None:
            return [Guide(kind=GuideKind.REGEX, source=given.regex, field=field)]
        case "grammar" if given.grammar is not None:
            return [Guide(kind=GuideKind.LARK, source=given.grammar, field=field)]
        case "json_schema" | "regex" | "grammar":
            raise InvalidRequest(field, "must be set for this type")
        case _:
            known = "text, json_object, json_schema, regex, grammar"
            raise InvalidRequest("response_format.type", f"must be one of {known}, got {given.type[:64]!r}")


def _of_structured(given: StructuredOutputs | None) -> list[Guide]:
    if given is None:
        return []
    guides = []
    if isinstance(given.json_, str):
        guides.append(Guide(kind=GuideKind.JSON_SCHEMA, source=given.json_, field="structured_outputs.json"))
    elif given.json_ is not None:
        guides.append(json_guide(given.json_, field="structured_outputs.json"))
    if given.json_object:
        guides.append(json_guide(ANY_OBJECT, field="structured_outputs.json_object"))
    if given.regex is not None:
        guides.append(Guide(kind=GuideKind.REGEX, source=given.regex, field="structured_outputs.regex"))
    if given.choice is not None:
        guides.append(choice_guide(given.choice, field="structured_outputs.choice"))
    if given.grammar is not None:
        guides.append(Guide(kind=GuideKind.LARK, source=given.grammar, field="structured_outputs.grammar"))
    return guides
