"""Wrong input from a seeded generator: raw bytes, mutated bytes, mutated values, values at the edges of types."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import msgspec

EDGES = (0, 1, -1, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, -(2**63), 2**64 - 1)
FLOATS = (0.0, -0.0, 1e-300, 1e308, -1e308, math.nan, math.inf, -math.inf, 0.5)
TEXTS = ("", "\x00", "a", "é" * 300, "x" * 5000, "{{7*7}}", "../../etc/passwd", "127.0.0.1:1", "\U0010ffff")
LARGE_BYTES = 20_000_000
"""More than a worker takes. Messages of hundreds of megabytes would hold up this process, which measures the others."""
BLOBS = (
    b"",
    b"\x00",
    b"\xff" * 9,
    b"\xdd\xff\xff\xff\xff",  # msgpack: a list of 4 billion
    b"\xc6\xff\xff\xff\xff",  # bytes of 4 GiB
    b"\xdf\xff\xff\xff\xff",  # a map of 4 billion
    b"\x91" * 20_000,  # lists in lists
    b"\x81\xa8commands\xdd\x00\x10\x00\x00",
    b"\x0a\xff\xff\xff\xff\x0f",  # protobuf: a field of 4 GiB
    b"\x0b" * 5000,  # groups in groups
    b"\x12\x02\xff\xfe",  # text that is not UTF-8
)


def raw_bytes(random: Random) -> bytes:
    if random.random() < 0.4:
        return random.choice(BLOBS)
    return random.randbytes(int(random.expovariate(1 / 40)))


def mutated_bytes(random: Random, data: bytes) -> bytes:
    """A few flips, cuts, repeats and insertions."""
    piece = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(piece) + 1)
        match random.randrange(5):
            case 0 if piece:
                piece[at % len(piece)] ^= 1 << random.randrange(8)
            case 1:
                del piece[at : at + random.randint(1, 8)]
            case 2:
                piece[at:at] = random.choice(BLOBS)[:64]
            case 3:
                piece[at:at] = piece[at : at + random.randint(1, 64)]
            case _:
                piece[at:at] = random.randbytes(random.randint(1, 4))
    return bytes(piece)


def edge_value(random: Random) -> Any:
    """Any value that msgpack can say."""
    match random.randrange(7):
        case 0 | 1:
            return random.choice(EDGES)
        case 2:
            return random.choice(FLOATS)
        case 3:
            return random.choice(TEXTS)
        case 4:
            return random.choice((None, True, b"\x00\xff", random.randbytes(16)))
        case 5:
            return [random.choice(EDGES)] * random.choice((0, 1, 3, 2000))
        case _:
            return {"type": random.choice(("Prefill", "Reserve", "Nothing")), "x": [[]]}


def mutated_value(random: Random, value: Any) -> Any:
    """The same plain value with one part of it, chosen anywhere, replaced, dropped or doubled."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        if random.random() < 0.1:
            return {name: part for name, part in value.items() if name != key}
        return {**value, key: mutated_value(random, value[key])}
    if isinstance(value, list | tuple) and value and random.random() < 0.8:
        at = random.randrange(len(value))
        inner = list(value)
        match random.randrange(6):
            case 0:
                del inner[at]
            case 1:
                most = LARGE_BYTES // len(msgspec.msgpack.encode(inner[at]))
                inner[at:at] = [inner[at]] * min(random.choice((1, 500)), most)
            case _:
                inner[at] = mutated_value(random, inner[at])
        return inner
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.6:
        return random.choice(EDGES)
    if isinstance(value, float) and random.random() < 0.6:
        return random.choice(FLOATS)
    return edge_value(random)


def mutated_message(random: Random, message: Any) -> bytes:
    """A msgspec message with one to three mutated parts, as msgpack."""
    value = msgspec.to_builtins(message, builtin_types=(bytes,))
    for _ in range(random.choice((1, 1, 2, 3))):
        value = mutated_value(random, value)
    return msgspec.msgpack.encode(value)
