"""litellm: completions and chat through its OpenAI provider, and its own exceptions for our errors."""

from __future__ import annotations

import litellm
from system import HTTP, MODEL

litellm.suppress_debug_info = True
where = {"api_base": f"{HTTP}/v1", "api_key": "none"}
chat = {"model": f"openai/{MODEL}", "messages": [{"role": "user", "content": "Name a colour."}], **where}
whole = litellm.completion(**chat, max_tokens=12, temperature=0)
assert whole.choices[0].message.content
assert whole.usage.completion_tokens <= 12
stream = litellm.completion(**chat, max_tokens=12, temperature=0, stream=True)
assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content
text = litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt="One, two,", max_tokens=4, **where)
assert text.choices[0].text
for wrong, expected in (
    ({"temperature": -1}, litellm.BadRequestError),
    ({"model": "openai/another"}, litellm.NotFoundError),
):
    try:
        litellm.completion(**{**chat, **wrong}, max_tokens=1)
    except expected:
        continue
    raise AssertionError(f"{wrong} was let pass")
