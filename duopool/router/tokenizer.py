"""Text to token ids and back, exactly as transformers' AutoTokenizer does it.

Owns the choice of how to load: a `tokenizer.json` that AutoTokenizer would take as it is is read by the `tokenizers`
library alone, which starts in a tenth of a second and needs no torch; for all others AutoTokenizer itself is asked.
Also owns the chat template and the end-of-sequence ids that the folder names. Weights are never touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from duopool.core.errors import InvalidRequest, ModelNotFound
from duopool.router.token_bytes import token_bytes

_TAKEN_AS_IT_IS = ("PreTrainedTokenizerFast", "TokenizersBackend")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GPT2_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


class Tokenizer:
    """One model's tokenizer. Encoding and decoding may be called from any thread."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self._special_tokens = special_tokens or {}
        self.eos_token_ids = eos_token_ids
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.max_token_chars = max(map(len, vocabulary), default=1)
        """No token stands for more characters than this: a longer text has at least chars / this many tokens."""
        self.num_ids = max(vocabulary.values(), default=-1) + 1

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Load from a Hugging Face folder; ModelNotFound when it holds no tokenizer."""
        config = _read_json(folder / "tokenizer_config.json")
        special = {name: _content(config[name]) for name in _SPECIAL_NAMES if config.get(name)}
        template = config.get("chat_template")
        template_file = folder / "chat_template.jinja"
        if template_file.is_file():
            template = template_file.read_text(encoding="utf-8")
        if isinstance(template, list):  # named templates, as older tokenizers keep them
            template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
        return cls(
            _backend(folder, config), chat_template=template, special_tokens=special, eos_token_ids=_eos_ids(folder)
        )

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    @property
    def template_knows_tools(self) -> bool:
        return "tools" in (self._chat_template or "")

    def warm_up(self) -> None:
        """Pay the imports that chat needs now, not with the first request."""
        if self._chat_template is not None:
            _render(self._chat_template, [{"role": "user", "content": "hello"}], self._special_tokens)

    def as_json(self) -> str:
        """The whole tokenizer as the content of a `tokenizer.json`."""
        text: str = self._backend.to_str()
        return text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = (), field: str = "messages"
    ) -> list[int]:
        """Ids of the model's template over `messages`, ready for the assistant's turn."""
        if self._chat_template is None:
            raise InvalidRequest(field, "the model has no chat template")
        try:
            text = _render(self._chat_template, messages, self._special_tokens, tools)
        except (ValueError, TypeError, LookupError) as error:
            raise InvalidRequest(field, f"the model's chat template refuses them: {error}") from error
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out. Ids without a token give no text."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=True)
        return text

    def text_of(self, token_id: int) -> str:
        """A token by itself, special or not."""
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text

    def spelling_of(self, token_id: int) -> tuple[str, bytes]:
        """A token by itself as text, and the bytes that it adds to a text, which may be a part of a character."""
        text = self.text_of(token_id)
        token: str | None = self._backend.id_to_token(token_id)
        if token is None or token_id in self._added_ids:
            return text, text.encode()
        return text, self._bytes_of(token)

    @cached_property
    def _bytes_of(self) -> Callable[[str], bytes]:
        return token_bytes(json.loads(self.as_json()).get("decoder"))


def _render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: dict[str, str],
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """ValueError when the template refuses."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), _ = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) or None,
            chat_template=template,
            add_generation_prompt=True,
            **special_tokens,
        )
    except jinja2.TemplateError as error:
        raise ValueError(str(error)) from error
    return str(text)


def _backend(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if file.is_file() and _is_taken_as_it_is(config, _read_json(file)):
        return tokenizers.Tokenizer.from_file(str(file))
    from transformers import AutoTokenizer

    try:
        slow_to_load = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"folder {folder} has no tokenizer that can be loaded: {error}") from error
    backend: tokenizers.Tokenizer | None = getattr(slow_to_load, "backend_tokenizer", None)
    if backend is None:
        raise ModelNotFound(f"the tokenizer in {folder} ({type(slow_to_load).__name__}) has no fast form")
    return backend


def _is_taken_as_it_is(config: dict[str, Any], content: dict[str, Any]) -> bool:
    """Whether AutoTokenizer would encode with exactly this `tokenizer.json`.

    Most classes build their own pipeline from its vocabulary; the generic one does not, and GPT-2's builds the same
    one if the file has GPT-2's parts. Flags for begin and end tokens change the post-processor.
    """
    if config.get("add_bos_token") or config.get("add_eos_token") or config.get("add_prefix_space"):
        return False
    known = {entry["id"]: entry["content"] for entry in content.get("added_tokens", ())}
    declared = config.get("added_tokens_decoder") or {}
    if any(known.get(int(token_id)) != _content(token) for token_id, token in declared.items()):
        return False
    vocabulary = content.get("model", {}).get("vocab", {})
    named = {_content(config[name]) for name in _SPECIAL_NAMES if config.get(name)}
    if not named <= set(known.values()) | set(vocabulary):
        return False
    kind = config.get("tokenizer_class")
    if kind in _TAKEN_AS_IT_IS:
        return True
    decoder = content.get("decoder") or {}
    return (
        kind in ("GPT2Tokenizer", "GPT2TokenizerFast")
        and content.get("normalizer") is None
        and content.get("pre_tokenizer") == _GPT2_PRE_TOKENIZER
        and decoder.get("type") == "ByteLevel"
        and content.get("model", {}).get("type") == "BPE"
    )


def _eos_ids(folder: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
