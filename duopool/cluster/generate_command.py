"""`duopool generate`: prompts to a running router, tokens to stdout."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from google.protobuf.json_format import MessageToDict

from duopool.cluster.admin_commands import DEFAULT_ADDRESS, Address
from duopool.cluster.completions import Completion, complete_all
from duopool.cluster.terminal import EXIT_FAILED, EXIT_USAGE, complain, describe, fail_with
from duopool.proto import inference_pb2 as pb


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' reads it from stdin.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with one prompt per line, each a JSON string; all are sent at once.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's message of a chat.")] = False,
    system: Annotated[str | None, typer.Option(help="System message before the user's; implies --chat.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    min_tokens: Annotated[int | None, typer.Option(help="Least tokens before the end may come. [0]")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. [1]")] = None,
    top_p: Annotated[float | None, typer.Option(help="Share of probability to sample from. [1]")] = None,
    top_k: Annotated[int | None, typer.Option(help="Number of tokens to sample from; 0 for all. [0]")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least probability relative to the likeliest token. [0]")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="[1]")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="[0]")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="[0]")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable; drawn by the router if absent.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be given more than once.")] = None,
    stop_token_ids: Annotated[list[int] | None, typer.Option(help="Stop token; may be given more than once.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.")] = False,
    model: Annotated[str, typer.Option(help="Name of the model; empty means the one that is served.")] = "",
    address: Address = DEFAULT_ADDRESS,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per request: token_ids, text, usage, stage times.")
    ] = False,
) -> None:
    """Generate from one prompt (streamed as it comes) or from a file of prompts (all at once)."""
    prompts = _prompts(prompt, prompt_file)
    given = {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
    }
    try:
        sampling = pb.SamplingParams(
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
            stop=stop or [],
            stop_token_ids=stop_token_ids or [],
            ignore_eos=ignore_eos,
        )
    except ValueError as error:
        _usage("sampling", str(error))
    requests = [_request(text, sampling, model, is_chat=chat or system is not None, system=system) for text in prompts]
    streams_text = len(requests) == 1 and not as_json
    try:
        records = asyncio.run(complete_all(address, requests, on_update=_print_text if streams_text else None))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    _print(records, as_json=as_json, streamed=streams_text)
    failed = [record for record in records if record.error is not None]
    for record in failed[:-1]:
        assert record.error is not None
        complain(f"{describe(record.error)}")
    if failed:
        assert failed[-1].error is not None
        fail_with(failed[-1].error, address)
    if any(record.finished is None for record in records):
        complain("a stream ended without its last message")
        raise typer.Exit(EXIT_FAILED)


def to_json(record: Completion) -> dict[str, Any]:
    """What came of one request, with durations in seconds."""
    answer: dict[str, Any] = {"token_ids": record.token_ids, "text": record.text}
    if record.started is not None:
        answer |= {"request_id": record.started.request_id, "seed": record.started.seed}
    if record.finished is not None:
        answer |= MessageToDict(
            record.finished, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        answer["times"]["transfer_bytes"] = record.finished.times.transfer_bytes
    if record.error is not None:
        answer["error"] = {
            "code": record.error.code.name,
            "message": record.error.message,
            "field": record.error.field,
            "reason": record.error.reason,
        }
    return answer


def _prompts(prompt: str | None, prompt_file: Path | None) -> list[str]:
    if (prompt is None) == (prompt_file is None):
        _usage("PROMPT", "give either a prompt or --prompt-file")
    if prompt_file is None:
        assert prompt is not None
        return [sys.stdin.read() if prompt == "-" else prompt]
    prompts = []
    try:
        lines = prompt_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        _usage("--prompt-file", str(error))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)
        except json.JSONDecodeError as error:
            _usage("--prompt-file", f"line {number} is not JSON: {error}")
        if not isinstance(text, str):
            _usage("--prompt-file", f"line {number} is not a JSON string")
        prompts.append(text)
    if not prompts:
        _usage("--prompt-file", f"{prompt_file} holds no prompt")
    return prompts


def _request(
    text: str, sampling: pb.SamplingParams, model: str, *, is_chat: bool, system: str | None
) -> pb.GenerateRequest:
    try:
        if not is_chat:
            return pb.GenerateRequest(model=model, text=text, sampling=sampling)
        messages = [pb.ChatMessage(role="user", content=text)]
        if system is not None:
            messages.insert(0, pb.ChatMessage(role="system", content=system))
        return pb.GenerateRequest(model=model, chat=pb.ChatMessages(messages=messages), sampling=sampling)
    except (UnicodeEncodeError, ValueError) as error:
        _usage("PROMPT", f"cannot be sent: {error}")


def _print_text(at: int, record: Completion, text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print(records: list[Completion], *, as_json: bool, streamed: bool) -> None:
    """Results on stdout: JSON objects, or the text of each prompt under its number."""
    if as_json:
        for record in records:
            typer.echo(json.dumps(to_json(record), ensure_ascii=False))
    elif streamed:
        typer.echo()
    else:
        for number, record in enumerate(records):
            typer.echo(f"--- {number} ---\n{record.text}")


def _usage(field: str, message: str) -> NoReturn:
    complain(f"{field}: {message}")
    raise typer.Exit(EXIT_USAGE)
