"""Text comes out complete, in order, never with half a character, and not past a stop string, however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from router_fakes import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models

from duopool.core.sampling_params import SamplingParams
from duopool.router.detokenizer import Detokenizer
from duopool.router.stop_strings import StopStrings
from duopool.router.text_stream import TextStream

BYTES = byte_tokenizer()
SPECIAL = frozenset({256, 257})
WORDS = ["▁the", "▁", "the", "n", "é", "▁日", "本", ",", *(f"<0x{byte:02X}>" for byte in range(256))]


def sentencepiece_tokenizer() -> Tokenizer:
    """Pieces with `▁` for spaces and single bytes as fall-back, joined as Llama's decoder does it."""
    tokenizer = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(WORDS)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


PIECES = sentencepiece_tokenizer()


def split(draw_from: list[int], cuts: list[int]) -> list[list[int]]:
    parts, at = [], 0
    for cut in cuts:
        parts.append(draw_from[at : at + cut])
        at += cut
    return [*parts, draw_from[at:]]


@given(st.text(), st.lists(st.integers(0, 5)))
def test_any_split_of_a_text_gives_the_text(text: str, cuts: list[int]) -> None:
    detokenizer = Detokenizer(BYTES.decode, special_ids=SPECIAL)
    ids = list(text.encode())
    out = [detokenizer.push(part) for part in split(ids, cuts)]
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in out)
    assert "".join(out) + detokenizer.finish() == text


@given(st.lists(st.integers(0, 257), max_size=40), st.lists(st.integers(0, 5)))
def test_any_bytes_give_the_same_text_however_they_are_cut(ids: list[int], cuts: list[int]) -> None:
    whole = Detokenizer(BYTES.decode, special_ids=SPECIAL)
    expected = whole.push(ids) + whole.finish()
    detokenizer = Detokenizer(BYTES.decode, special_ids=SPECIAL)
    assert "".join(map(detokenizer.push, split(ids, cuts))) + detokenizer.finish() == expected


@given(st.lists(st.sampled_from(WORDS[:8]), min_size=1, max_size=12), st.integers(1, 4))
def test_spaces_of_pieces_are_kept_behind_a_prompt(pieces: list[str], num_prompt: int) -> None:
    ids = [WORDS.index(piece) for piece in pieces]
    prompt = [WORDS.index("▁the")] * num_prompt
    detokenizer = Detokenizer(PIECES.decode, prompt_token_ids=prompt)
    text = "".join(detokenizer.push([token]) for token in ids) + detokenizer.finish()
    assert PIECES.decode(prompt) + text == PIECES.decode(prompt + ids)


@given(st.text(alphabet="日本é€😀a", min_size=1, max_size=8))
def test_characters_from_byte_pieces_come_out_whole(text: str) -> None:
    ids = [WORDS.index(f"<0x{byte:02X}>") for byte in text.encode()]
    detokenizer = Detokenizer(PIECES.decode, prompt_token_ids=[WORDS.index("n")])
    out = [detokenizer.push([token]) for token in ids]
    assert all("\ufffd" not in piece for piece in out)
    assert "".join(out) == text


def test_bytes_that_are_no_text_are_not_held_for_ever() -> None:
    detokenizer = Detokenizer(BYTES.decode)
    out = "".join(detokenizer.push([0x80]) for _ in range(100))
    assert len(out) >= 80
    assert len(out) + len(detokenizer.finish()) == 100


small = st.text(alphabet="ab", max_size=30)
stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


def first_stop(text: str, stop: list[str]) -> tuple[int, int] | None:
    """(start, end) of the stop string that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        starts = [end - len(one) for one in stop if text[:end].endswith(one)]
        if starts:
            return min(starts), end
    return None


@given(small, stops, st.lists(st.integers(0, 4)), st.booleans())
def test_stop_strings_do_not_depend_on_the_cut(text: str, stop: list[str], cuts: list[int], include: bool) -> None:
    matcher = StopStrings(stop, include_in_output=include)
    pieces, at = [], 0
    for cut in [*cuts, len(text)]:
        pieces.append(matcher.push(text[at : at + cut]))
        at += cut
    found = first_stop(text, stop)
    if found is None:
        assert matcher.matched is None
        assert "".join(pieces) + matcher.finish() == text
    else:
        start, end = found
        assert matcher.matched == text[start:end]
        assert "".join(pieces) == text[: end if include else start]
        assert matcher.finish() == ""


@given(small, stops)
def test_nothing_is_held_that_cannot_become_a_stop_string(text: str, stop: list[str]) -> None:
    matcher = StopStrings(stop)
    shown = matcher.push(text)
    if matcher.matched is None:
        held = text[len(shown) :]
        assert not held or any(one.startswith(held) for one in stop)


@given(st.text(alphabet="abé", max_size=20), stops, st.integers(0, 5), st.integers(0, 20))
def test_a_continued_stream_goes_on_where_the_text_stopped(text, stop, min_tokens, num_sent) -> None:
    ids = list(text.encode())
    params = SamplingParams(max_tokens=100, min_tokens=min_tokens, stop=tuple(stop))

    def new_stream() -> TextStream:
        return TextStream(Detokenizer(BYTES.decode, special_ids=SPECIAL), params)

    whole = new_stream()
    num_taken, expected = whole.push(ids)
    expected += whole.finish()
    first, second = new_stream(), new_stream()
    num_sent = min(num_sent, num_taken)
    _, sent = first.push(ids[:num_sent])
    second.push(ids[:num_sent])
    if second.stopped_by is None:
        sent += second.push(ids[num_sent:])[1] + second.finish()
    assert sent == expected


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, ""), (1, "x"), (2, "xx")])
def test_stop_strings_count_only_behind_min_tokens(min_tokens: int, expected: str) -> None:
    params = SamplingParams(max_tokens=9, min_tokens=min_tokens, stop=("x",))
    stream = TextStream(Detokenizer(BYTES.decode), params)
    assert stream.push([ord("x")] * 5) == (min_tokens + 1, expected)


def test_the_stop_token_is_not_shown() -> None:
    stream = TextStream(Detokenizer(BYTES.decode, special_ids=SPECIAL), SamplingParams())
    assert stream.push([ord("a"), ord("b")], hidden=ord("b")) == (2, "a")
