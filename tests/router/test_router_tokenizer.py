"""Ids and text are exactly those of transformers' AutoTokenizer, whichever way a tokenizer is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st
from router_fakes import TEMPLATE, byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from duopool.core.errors import InvalidRequest, ModelNotFound
from duopool.router.tokenizer import Tokenizer as RouterTokenizer

TEXTS = (
    "",
    " leading and  double",
    "12345 x = 3.14\n\n\treturn",
    "日本語 テキスト 😀 é́ ﬁ",
    "<s>special</s> in text",
    "a" * 600,
    "tab\tand\r\nlines",
)
CHAT = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "héllo <s> 12"})


def byte_level() -> Tokenizer:
    return byte_tokenizer()


def with_digits_and_begin() -> Tokenizer:
    """Digits one by one and a begin token by template, as many models have it."""
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.enable_truncation(max_length=16)
    return tokenizer


def whole_words() -> Tokenizer:
    vocabulary = {"<unk>": 0, "the": 1, "tab": 2, "in": 3, "text": 4, "double": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def folder_of(tokenizer: Tokenizer, folder: Path, **config: object) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 257}))
    return folder


@pytest.mark.parametrize("make", [byte_level, with_digits_and_begin, whole_words])
@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": "TokenizersBackend"},
        {"tokenizer_class": "GPT2Tokenizer"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True},
        {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<never>"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"__type": "AddedToken", "content": "</s>"}},
    ],
    ids=["fast", "backend", "gpt2", "begin", "unknown", "token-object"],
)
def test_ids_and_text_equal_those_of_auto_tokenizer(make, config: dict, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    if config["tokenizer_class"] == "GPT2Tokenizer" and make is whole_words:
        pytest.skip("GPT-2's class takes BPE only")
    folder = folder_of(make(), tmp_path, **config)
    ours, theirs = RouterTokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    rendered = theirs.apply_chat_template(list(CHAT), add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(CHAT) == rendered
    assert ours.eos_token_ids == {257}


def test_no_token_is_longer_than_the_bound(tmp_path: Path) -> None:
    tokenizer = RouterTokenizer.from_folder(folder_of(byte_tokenizer(), tmp_path, tokenizer_class="TokenizersBackend"))
    for text in TEXTS:
        assert len(tokenizer.encode(text)) * tokenizer.max_token_chars >= len(text)


def test_folders_without_a_tokenizer_and_models_without_chat_say_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        RouterTokenizer.from_folder(tmp_path)
    with pytest.raises(InvalidRequest, match="template"):
        RouterTokenizer(byte_tokenizer()).encode_chat(CHAT)
    refusing = RouterTokenizer(byte_tokenizer(), chat_template="{{ raise_exception('only one system message') }}")
    with pytest.raises(InvalidRequest, match="only one system message"):
        refusing.encode_chat(CHAT)


def pieces_with_bytes() -> Tokenizer:
    """As SentencePiece has it: a mark for a blank, and single bytes for what has no piece."""
    pieces = ["\u2581the", "\u2581", "the", "\u00e9", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, pieces_with_bytes])
def test_the_bytes_of_a_token_are_those_that_llguidance_reads(make) -> None:
    backend = make()
    ours, theirs = RouterTokenizer(backend), llguidance.LLTokenizer(backend.to_str())
    *ids, last = (token_id for token_id in range(ours.num_ids) if token_id not in ours.special_ids)
    assert ours.spelling_of(last)[1] == b"\xff", "which is a mark of llguidance's own"
    assert [ours.spelling_of(token_id)[1] for token_id in ids] == [theirs.decode_bytes([token_id]) for token_id in ids]
    assert ours.spelling_of(ours.num_ids - 1)[1] in (b"<s>", b"</s>")


@given(st.text())
def test_the_bytes_of_all_tokens_are_those_of_the_text(text: str) -> None:
    tokenizer = RouterTokenizer(byte_level())
    assert b"".join(tokenizer.spelling_of(token_id)[1] for token_id in tokenizer.encode(text)) == text.encode()


def test_a_part_of_a_character_has_its_byte_and_no_text_of_its_own() -> None:
    tokenizer = RouterTokenizer(byte_level())
    parts = [tokenizer.spelling_of(token_id) for token_id in tokenizer.encode("\u20ac")]
    assert [token_bytes for _, token_bytes in parts] == [b"\xe2", b"\x82", b"\xac"]
    assert {text for text, _ in parts} == {"\ufffd"}
