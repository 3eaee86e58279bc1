"""Constrained output: what is sampled under a grammar always matches it, and a mask depends on the tokens alone."""

from __future__ import annotations

import json
from pathlib import Path

import llguidance
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from duopool.core.sampling_params import SamplingParams
from duopool.core.step import SampleSpec
from duopool.engine.grammar import GrammarMasks
from duopool.engine.sampler import sample

EOS = 256
VOCAB_SIZE = 300
"""More than the tokenizer has: the rest of the model's output layer is padding."""
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["colour", "size"],
    "additionalProperties": False,
}
GRAMMAR = llguidance.LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_pattern": "[ ]?"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a token per byte and an end of sequence."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    order = {character: byte for byte, character in enumerate(sorted(alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=order, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def masks_of(folder: Path) -> GrammarMasks:
    return GrammarMasks.from_folder(folder, vocab_size=VOCAB_SIZE, eos_token_ids=[EOS])


def generate(masks: GrammarMasks, *, seed: int, **params: object) -> list[int]:
    """What a model with random logits says until it ends its output, or 80 tokens."""
    noise = torch.Generator().manual_seed(seed)
    asked = SamplingParams(max_tokens=100, seed=seed, grammar=GRAMMAR, **params)
    output: list[int] = []
    while len(output) < 80 and (not output or output[-1] != EOS):
        spec = SampleSpec(
            params=asked, prompt_token_ids=[1], output_token_ids=list(output), eos_token_ids=frozenset({EOS})
        )
        logits = torch.randn(1, VOCAB_SIZE, generator=noise) * 5
        output.append(sample(logits, [spec], masks)[0].token_id)
    return output


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.5, "top_p": 0.5, "top_k": 3}, {"min_tokens": 99}],
)
def test_whatever_the_model_wants_the_output_matches(folder: Path, params: dict[str, object]) -> None:
    masks, tokenizer = masks_of(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for seed in range(20):
        output = generate(masks, seed=seed, **params)
        assert output[-1] == EOS
        read = json.loads(tokenizer.decode(output))
        assert set(read) == {"colour", "size"}
        assert read["colour"] in ("red", "green")
        assert 0 <= read["size"] <= 99


def test_a_mask_is_a_function_of_the_tokens_alone(folder: Path) -> None:
    """Step by step, by replay on another worker, and when two requests with the same tokens share the matchers."""
    stepping = masks_of(folder)
    output = generate(masks_of(folder), seed=3)
    for length in range(len(output)):
        so_far = output[:length]
        mask = stepping.allowed(GRAMMAR, so_far)
        assert mask.shape == (VOCAB_SIZE,)
        assert mask[output[length]]
        np.testing.assert_array_equal(mask, stepping.allowed(GRAMMAR, so_far))
        np.testing.assert_array_equal(mask, masks_of(folder).allowed(GRAMMAR, so_far))


def test_tokens_that_the_grammar_forbids_end_the_output(folder: Path) -> None:
    """A continued stream may come with any tokens: that must not fail the step."""
    mask = masks_of(folder).allowed(GRAMMAR, [5, 6, 7])
    assert mask.nonzero()[0].tolist() == [EOS]


def test_other_rows_are_not_touched(folder: Path) -> None:
    logits = torch.randn(2, VOCAB_SIZE)
    free = SampleSpec(params=SamplingParams(temperature=0.0), prompt_token_ids=[1], output_token_ids=[])
    bound = SampleSpec(
        params=SamplingParams(temperature=0.0, grammar=GRAMMAR), prompt_token_ids=[1], output_token_ids=[]
    )
    together = [token.token_id for token in sample(logits, [free, bound], masks_of(folder))]
    assert together[0] == logits[0].argmax()
    assert together[1] == sample(logits[1:], [bound], masks_of(folder))[0].token_id
