"""`duopool chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from duopool.client import CallFailed, Client
from duopool.cluster.admin_commands import DEFAULT_ADDRESS, Address
from duopool.cluster.terminal import EXIT_FAILED, complain, err, out
from duopool.proto import inference_pb2 as pb

HELP = "/clear forgets the conversation, /undo takes the last question back, /quit or Ctrl-D ends"


def chat(
    system: Annotated[str | None, typer.Option(help="System message that begins the conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. [1]")] = None,
    top_p: Annotated[float | None, typer.Option(help="Share of probability to sample from. [1]")] = None,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Talk with the served model; the prefix cache keeps the conversation so far."""
    sampling: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    with Client(address) as client:
        if sys.stdin.isatty():
            err.print(f"[dim]{HELP}[/dim]", highlight=False)
        conversation = Conversation(
            lambda messages: client.generate(messages=messages, **sampling), system=system, write=_write
        )
        while (line := _read()) is not None and conversation.say(line):
            pass
    if conversation.has_failed and not sys.stdin.isatty():
        raise typer.Exit(EXIT_FAILED)


Messages = list[dict[str, str]]


class Conversation:
    """What was said so far. An answer that fails or is interrupted leaves the question out."""

    def __init__(
        self,
        generate: Callable[[Messages], Iterable[pb.Started | pb.TokenChunk | pb.Finished]],
        *,
        system: str | None,
        write: Callable[[str], None],
    ) -> None:
        self._generate = generate
        self._write = write
        self._opening: Messages = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._opening)
        self.has_failed = False

    def say(self, line: str) -> bool:
        """Take one line of the user's; False when it ends the conversation."""
        match line.strip():
            case "":
                pass
            case "/quit" | "/exit":
                return False
            case "/clear":
                self.messages = list(self._opening)
            case "/undo":
                del self.messages[max(len(self._opening), len(self.messages) - 2) :]
            case "/help":
                self._write(HELP + "\n")
            case question:
                self._ask(question)
        return True

    def _ask(self, question: str) -> None:
        asked = [*self.messages, {"role": "user", "content": question}]
        answer = ""
        try:
            for event in self._generate(asked):
                if isinstance(event, pb.TokenChunk):
                    answer += event.text
                    self._write(event.text)
        except CallFailed as failure:
            self.has_failed = True
            self._write("\n")
            complain(str(failure))
            return
        except KeyboardInterrupt:
            self._write("\n")
            return
        self._write("\n")
        self.messages = [*asked, {"role": "assistant", "content": answer}]


def _read() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _write(text: str) -> None:
    out.file.write(text)
    out.file.flush()
