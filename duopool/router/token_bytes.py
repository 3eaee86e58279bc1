"""The bytes that a token of the vocabulary stands for, which need not be whole characters.

Vocabularies spell bytes in one of two ways: with a printable character for every byte (byte-level, as GPT-2 has it), or
as `<0xE2>` beside tokens of plain text in which a mark stands for a blank (byte fallback, as SentencePiece has it).
Source: the decoders of https://github.com/huggingface/tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK = "\u2581"


def token_bytes(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    """How to read a token of the vocabulary, given the decoder of its `tokenizer.json`."""
    kinds = {part.get("type") for part in _parts(decoder)}
    if "ByteLevel" in kinds:
        return _byte_level
    return _byte_fallback if kinds & {"ByteFallback", "Metaspace"} else str.encode


def byte_characters() -> list[str]:
    """GPT-2's character for every byte: itself where it can be printed, else one from 256 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in plain else next(spare)) for byte in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}


def _byte_level(token: str) -> bytes:
    if any(character not in _BYTE_OF for character in token):
        return token.encode()
    return bytes(_BYTE_OF[character] for character in token)


def _byte_fallback(token: str) -> bytes:
    spelled = _BYTE.fullmatch(token)
    return bytes([int(spelled[1], 16)]) if spelled else token.replace(_BLANK, " ").encode()


def _parts(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The decoder itself, and those that a sequence is made of."""
    if decoder is not None:
        yield decoder
        for part in decoder.get("decoders", ()):
            yield from _parts(part)
