"""The eight requests of `duopool demo`: three share a long system prompt, one is longer than 1,000 tokens."""

from __future__ import annotations

from duopool.proto import inference_pb2 as pb

MAX_TOKENS = 48

_SYSTEM = (
    "You are the assistant of a small library in a town by the sea. The library lends books, maps, tools and musical "
    "instruments. Visitors ask about opening times, about what to read next and about the history of the town. Answer "
    "in two or three plain sentences. Name a book only if you are sure that it exists. If a question is about an "
    "account, ask the visitor to come to the desk, since you cannot see accounts. The library opens at nine in the "
    "morning and closes at six in the evening; on Thursdays it stays open until eight, and on Sundays it is closed. "
    "Tools may be kept for a week, books for a month, instruments for three months. The harbour was built in 1742 "
    "after a great storm, the lighthouse in 1811, and the railway reached the town in 1869. The oldest map in the "
    "collection shows the bay before the harbour was dug. Children may borrow from the age of six with a card that a "
    "parent has signed. Be friendly, be brief, and do not invent rules that are not listed here."
)

_NOTE = (
    "Entry {number}. The wind came from the {wind} and the sea was {sea}. We counted {count} boats in the harbour, "
    "took the depth at the second mark, and wrote down {depth} fathoms. The keeper of the lamp saw nothing unusual. "
)
_WINDS = ("north", "east", "south", "west")
_SEAS = ("calm", "rough", "grey and even", "high at noon")


def demo_requests() -> list[tuple[str, pb.GenerateRequest]]:
    """Title and request of each prompt; all greedy."""
    return [
        ("hours", _chat("When can I come on a Thursday?")),
        ("tools", _chat("How long may I keep a hammer?")),
        ("history", _chat("When was the lighthouse built?")),
        ("log book", _text(_log_book() + "\n\nIn short, the log book says that")),
        ("story", _text("Once upon a time, in a village at the foot of a mountain,")),
        ("fact", _text("The capital of France is")),
        ("list", _text("Three things to pack for a walk in the rain:\n1.")),
        ("code", _text('def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n')),
    ]


def _log_book() -> str:
    entries = (
        _NOTE.format(number=n, wind=_WINDS[n % 4], sea=_SEAS[n % 3], count=3 + n * 7 % 11, depth=4 + n * 5 % 9)
        for n in range(1, 25)
    )
    return "".join(entries)


def _text(text: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, sampling=_sampling())


def _chat(question: str) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role="system", content=_SYSTEM), pb.ChatMessage(role="user", content=question)]
    return pb.GenerateRequest(chat=pb.ChatMessages(messages=messages), sampling=_sampling())


def _sampling() -> pb.SamplingParams:
    return pb.SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
