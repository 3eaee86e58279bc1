"""OpenAI's own client, unmodified, against a running system with the real model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import openai
import pytest
import torch
from calls import is_at_rest, state, wait_for
from openai import OpenAI
from reference import MAX_TOKENS, Reference
from remains import Remains

from duopool.cluster.config import ClusterConfig
from duopool.cluster.system import System
from duopool.core.config import CacheConfig, ModelConfig, SchedulerConfig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(290)]

MODEL = "smollm2"
BLOCK = 16
CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "country": {"enum": ["France", "Italy"]},
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
    },
    "required": ["name", "country", "inhabitants"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def system(nothing_remains: Remains) -> Iterator[System]:
    config = ClusterConfig(
        port=0,
        http_port=0,
        model=ModelConfig(dtype="float32"),
        cache=CacheConfig(block_size=BLOCK, num_blocks=600),
        scheduler=SchedulerConfig(max_num_batched_tokens=128),
        smg_port=0,
    )
    with System.start(config) as running:
        nothing_remains.watch(running.address)
        yield running


@pytest.fixture(scope="module")
def client(system: System) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{system.routers[0].http_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_greedy_completion_is_the_models_own(client: OpenAI, reference: Reference) -> None:
    prompts = [list(reference.words(start, length)) for start, length in ((5, 20), (300, 150))]
    wanted = [reference.tokenizer.decode(reference.greedy(tuple(prompt))) for prompt in prompts]
    answer = client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=MAX_TOKENS, temperature=0, extra_body={"ignore_eos": True}
    )
    assert [choice.text for choice in answer.choices] == wanted
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 170
    assert answer.usage.completion_tokens == 2 * MAX_TOKENS

    again = client.completions.create(model=MODEL, prompt=prompts[1], max_tokens=1, temperature=0)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == 149 // BLOCK * BLOCK


def test_echo_tells_the_models_own_logprobs_of_the_prompt(client: OpenAI, reference: Reference) -> None:
    """Over several prefill chunks, and equal when the prompt is cached already."""
    ids = reference.words(40, 200)
    all_logprobs = reference.logprobs(ids)[:-1]
    wanted = all_logprobs.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    for _ in range(2):
        answer = client.completions.create(model=MODEL, prompt=list(ids), echo=True, logprobs=1, max_tokens=0)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.token_logprobs[0] is None
        torch.testing.assert_close(torch.tensor(logprobs.token_logprobs[1:]), wanted, atol=1e-3, rtol=1e-3)
        best = [max(top.values()) for top in (logprobs.top_logprobs or [])[1:]]
        torch.testing.assert_close(torch.tensor(best), all_logprobs.amax(-1), atol=1e-3, rtol=1e-3)
        assert "".join(logprobs.tokens or []) == answer.choices[0].text


def test_a_chat_streams_what_it_answers_in_one_piece(client: OpenAI) -> None:
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Name three colours."}],
        "max_completion_tokens": 24,
        "seed": 7,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**asked)
    texts, roles, reasons, tokens = ["", ""], [None, None], [None, None], [0, 0]
    usage = None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] = roles[choice.index] or choice.delta.role
            reasons[choice.index] = choice.finish_reason
            tokens[choice.index] += len(choice.logprobs.content or []) if choice.logprobs else 0
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert tokens == [len(choice.logprobs.content or []) for choice in whole.choices if choice.logprobs]
    assert roles == ["assistant", "assistant"]
    assert texts[0] != texts[1]
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == sum(tokens)


def test_bias_stop_and_penalty_do_what_they_say(client: OpenAI, reference: Reference) -> None:
    asked = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    plain = client.completions.create(**asked).choices[0].text
    first = reference.tokenizer(plain)["input_ids"][0]
    biased = client.completions.create(**asked, logit_bias={str(first): -100}).choices[0].text
    assert reference.tokenizer(biased)["input_ids"][0] != first
    stopped = client.completions.create(**asked, stop=[plain[3:5]]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (plain[: plain.index(plain[3:5])], "stop")


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_schema_holds_whatever_the_temperature(client: OpenAI, temperature: float) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell me about Paris as JSON."}],
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}},
        temperature=temperature,
        max_tokens=100,
        seed=11,
        n=3,
    )
    for choice in answer.choices:
        city = json.loads(choice.message.content or "")
        assert set(city) == {"name", "country", "inhabitants"}
        assert city["country"] in ("France", "Italy")
        assert 0 <= city["inhabitants"] <= 99_999_999
        assert choice.finish_reason == "stop"


def test_a_tool_that_must_be_called_is_called(client: OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "look_up_city", "parameters": CITY}}
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "How many people live in Rome?"}],
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "look_up_city"}},
        "max_tokens": 120,
        "seed": 5,
    }
    (choice,) = client.chat.completions.create(**asked).choices
    (call,) = choice.message.tool_calls or []
    assert choice.finish_reason == "tool_calls"
    assert call.function.name == "look_up_city"
    assert set(json.loads(call.function.arguments)) == {"name", "country", "inhabitants"}
    streamed = [
        part
        for chunk in client.chat.completions.create(**asked, stream=True)
        for choice in chunk.choices
        for part in choice.delta.tool_calls or []
    ]
    assert [part.function.arguments for part in streamed if part.function] == [call.function.arguments]


def test_errors_are_what_the_client_expects(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="a", temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="a")
    with pytest.raises(openai.BadRequestError, match="prompt: has 100000 tokens"):
        client.completions.create(model=MODEL, prompt=[1] * 100_000)


def test_a_client_that_leaves_frees_everything(client: OpenAI, system: System) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_for(system.address, is_at_rest)


def test_the_rest_of_the_interface_answers(client: OpenAI, system: System) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with httpx.Client(base_url=system.routers[0].http_url or "") as plain:
        tokens = plain.post("/tokenize", json={"prompt": "Hello, wörld"}).json()["tokens"]
        assert plain.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "Hello, wörld"}
        assert plain.get("/ready").json()["ready"]
        assert plain.get("/version").json()["version"]
        assert b"duopool:time_to_first_token_seconds_count" in plain.get("/metrics").content
        assert "/v1/chat/completions" in plain.get("/openapi.json").json()["paths"]


def test_the_smg_gateways_protocol_drives_the_same_workers(system: System, reference: Reference) -> None:
    """As the gateway does it: a prompt to the prefill worker, what that answers to the decode worker."""
    wire = pytest.importorskip("smg_grpc_proto.generated.vllm_engine_pb2")
    stubs = pytest.importorskip("smg_grpc_proto.generated.vllm_engine_pb2_grpc")
    address = {info.role: info.notes[-1].split()[-1] for info in system.view.members}
    pulled = {worker.role: worker.pulled_blocks for worker in state(system.address).workers}
    prompts = [prompt for prompt in reference.prompts() if len(prompt) in (17, 129)]
    with grpc.insecure_channel(address["prefill"]) as to_prefill, grpc.insecure_channel(address["decode"]) as to_decode:
        prefill, decode = stubs.VllmEngineStub(to_prefill), stubs.VllmEngineStub(to_decode)
        for prompt in prompts:
            request = wire.GenerateRequest(
                tokenized=wire.TokenizedInput(input_ids=prompt),
                sampling_params=wire.SamplingParams(max_tokens=1, temperature=0, ignore_eos=True),
            )
            (answer,) = prefill.Generate(request, timeout=60)
            request.sampling_params.max_tokens = MAX_TOKENS
            request.kv_transfer_params_json = answer.complete.kv_transfer_params_json
            request.stream = True
            told = [
                token_id for message in decode.Generate(request, timeout=60) for token_id in message.chunk.token_ids
            ]
            assert tuple(told) == reference.greedy(prompt)
    now = {worker.role: worker.pulled_blocks for worker in wait_for(system.address, is_at_rest).workers}
    assert now["decode"] - pulled["decode"] == sum(math.ceil(len(prompt) / BLOCK) for prompt in prompts)


@pytest.mark.parametrize("example", ["openai_stream.py", "structured.py", "many_at_once.py"])
def test_the_examples_of_the_documentation_run(example: str, system: System) -> None:
    root = Path(__file__).resolve().parents[2]
    address = system.address if example == "many_at_once.py" else f"{system.routers[0].http_url}/v1"
    path = os.pathsep.join(part for part in (str(root), os.environ.get("PYTHONPATH", "")) if part)
    ran = subprocess.run(
        [sys.executable, root / "docs" / "examples" / example, address],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
        cwd=root / "docs",
    )
    assert ran.returncode == 0, ran.stderr
    said = {"openai_stream.py": "generated", "structured.py": "'is_capital'", "many_at_once.py": "transfer"}
    assert said[example] in ran.stdout
