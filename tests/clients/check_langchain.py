"""langchain-openai: an answer, a stream, a batch, structured output and a tool call."""

from __future__ import annotations

from typing import Annotated

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field
from system import HTTP, MODEL

chat = ChatOpenAI(model=MODEL, base_url=f"{HTTP}/v1", api_key="none", temperature=0, max_tokens=16)
whole = chat.invoke("Name a colour.")
assert whole.content
assert whole.usage_metadata is not None
assert whole.usage_metadata["output_tokens"] <= 16
assert "".join(str(chunk.content) for chunk in chat.stream("Name a colour.")) == whole.content
assert [answer.content for answer in chat.batch(["Name a colour.", "Name a colour."])] == [whole.content] * 2


class City(BaseModel):
    name: str = Field(max_length=20)
    inhabitants: int = Field(ge=0, le=99_999_999)


long = ChatOpenAI(model=MODEL, base_url=f"{HTTP}/v1", api_key="none", temperature=0, max_tokens=80)
city = long.with_structured_output(City, method="json_schema")
assert isinstance(city.invoke("Tell me about Paris."), City)


@tool
def multiply(a: Annotated[int, Field(ge=0, le=999)], b: Annotated[int, Field(ge=0, le=999)]) -> int:
    """Multiply two numbers."""
    return a * b


calls = long.bind_tools([multiply], tool_choice="multiply").invoke("What is 6 times 7?").tool_calls
assert [call["name"] for call in calls] == ["multiply"]
assert set(calls[0]["args"]) == {"a", "b"}

text = OpenAI(model=MODEL, base_url=f"{HTTP}/v1", api_key="none", temperature=0, max_tokens=8, n=2)
answers = text.generate(["The capital of France is", "One, two,"])
assert [len(each) for each in answers.generations] == [2, 2]
