"""The cases: one wrong call each, over the public gRPC, the internal gRPC, sessions, block reads, HTTP and bare TCP."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc

from duopool.core.messages import (
    BlocksReady,
    Cancel,
    Choice,
    Command,
    CommandBatch,
    Copied,
    DescribeSource,
    GenerationRequest,
    Heartbeat,
    LeaseRef,
    LedgerWanted,
    Migrate,
    Prefill,
    ReadBlocks,
    Rebind,
    Reserve,
    SealedBlock,
    SnapshotWanted,
    Stay,
    Tokens,
    Validate,
)
from duopool.core.sampling_params import SamplingParams
from duopool.core.types import BlockId, FinishReason, Incarnation, LeaseId, RequestId, WorkerId
from duopool.proto import codec
from duopool.proto import inference_pb2 as pb

from .garbage import EDGES, FLOATS, TEXTS, mutated_bytes, mutated_message, mutated_value, raw_bytes
from .target import Target
from .tiny import MAX_MODEL_LEN, VOCAB_SIZE

CASE_TIMEOUT_S = 20.0
PUBLIC = ("Generate", "Tokenize", "Detokenize", "ListModels")
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 2, "stop": "x", "logit_bias": {"5": 1}}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 0, "echo": True, "logprobs": 2, "n": 2}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 3, "structured_outputs": {"choice": ["yes", "no"]}}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 3, "response_format": {"type": "regex", "regex": "[a-z]{2}"}}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 2, "structured_outputs": {"grammar": 'start: "a" | "b" start'}}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {**CHAT, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}),
    (
        "/v1/chat/completions",
        {
            **CHAT,
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "schema": {"type": "object", "properties": {"a": {"enum": [1, "b"]}}, "required": ["a"]}
                },
            },
        },
    ),
    ("/tokenize", {"prompt": "hi"}),
    ("/detokenize", {"tokens": [1, 2]}),
)
NUMBERS = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "n", "seed", "priority", "logprobs", "top_logprobs"),
)
ADMIN = ("ClusterState", "Scale", "Drain", "Audit")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended."""

    kind: str
    code: str
    detail: str = ""
    num_tokens: int = 0
    """Generated tokens in the answer."""


class Cases:
    """Makes cases from a generator; one instance per thread."""

    def __init__(self, target: Target, random: Random) -> None:
        self._target = target
        self._random = random
        self._public = grpc.insecure_channel(target.address, options=(("grpc.use_local_subchannel_pool", 1),))
        self._internal = target.access.channel(target.internal_address)
        self._workers = {role: target.access.channel(info.address) for role, info in target.workers.items()}

    def close(self) -> None:
        for channel in (self._public, self._internal, *self._workers.values()):
            channel.close()

    def run(self) -> Outcome:
        """One case."""
        kinds: dict[Callable[[], Outcome], int] = {
            self._public_call: 30,
            self._session: 40,
            self._block_read: 18,
            self._internal_call: 6,
            self._http: 8,
            self._tcp: 2,
        }
        (case,) = self._random.choices(list(kinds), list(kinds.values()))
        return case()

    # ---- public ----------------------------------------------------------------------------------------------------

    def _public_call(self) -> Outcome:
        random = self._random
        name = random.choices(PUBLIC, (7, 2, 1, 1))[0]
        message = {"Generate": self._generate, "Tokenize": self._tokenize, "Detokenize": self._detokenize}.get(name)
        data = b"" if message is None else message().SerializeToString()
        kind = random.choice(("raw", "mutated", "edges", "edges", "left"))
        if kind == "raw":
            data = raw_bytes(random)
        elif kind == "mutated":
            data = mutated_bytes(random, data)
        if random.random() < 0.002:
            data = b"\x12\x80\x80\x80\x02" + b"a" * (4 << 20)
        method = f"/duopool.v1.Inference/{name}" if random.random() < 0.97 else f"/{random.choice(TEXTS[2:3])}/b"
        leave_after = random.randrange(3) if kind == "left" else None
        return self._call(f"public {name} {kind}", self._public, method, [data], leave_after=leave_after)

    def _generate(self) -> pb.GenerateRequest:
        random = self._random
        sampling = pb.SamplingParams(max_tokens=random.randint(1, 6), temperature=random.choice((0.0, 1.0)))
        for _ in range(random.choice((0, 0, 1, 2))):
            field = random.choice([field for field in sampling.DESCRIPTOR.fields if not field.is_repeated])
            values = EDGES if field.cpp_type in (1, 2, 3, 4) else FLOATS
            with contextlib.suppress(ValueError, TypeError):
                setattr(sampling, field.name, random.choice(values))
        if random.random() < 0.2:
            sampling.stop.extend([random.choice(TEXTS)] * random.choice((1, 20)))
        if random.random() < 0.2:
            sampling.logit_bias[random.choice((0, 5, VOCAB_SIZE, 2**32 - 1))] = random.choice(FLOATS)
        if random.random() < 0.1:
            sampling.stop_token_ids.extend([random.choice((0, VOCAB_SIZE, 2**32 - 1))] * random.choice((1, 200)))
        request = pb.GenerateRequest(sampling=sampling, cache_salt=random.randbytes(random.choice((0, 4, 300))))
        match random.randrange(4):
            case 0:
                request.text = random.choice((*TEXTS, "hello", "a" * 200_000))
            case 1:
                roles = random.choice((("user",), ("system", "user"), ("wizard",), ("user",) * 3000))
                for role in roles:
                    request.chat.messages.add(role=role, content=random.choice(TEXTS[:4]))
            case _:
                length = random.choice((0, 1, 3, 40, MAX_MODEL_LEN - 1, MAX_MODEL_LEN, 100_000))
                request.token_ids.ids.extend([random.choice((1, VOCAB_SIZE - 1, VOCAB_SIZE, 2**32 - 1))] * length)
        if random.random() < 0.2:
            request.resume_from.ids.extend([random.choice((3, 257, VOCAB_SIZE))] * random.choice((1, 4, 300)))
        if random.random() < 0.1:
            request.request_id = random.choice(TEXTS)
        if random.random() < 0.1:
            request.resume_choices.extend([pb.TokenIds(ids=[3] * random.choice((0, 1)))] * random.choice((1, 3, 200)))
        if random.random() < 0.2:
            request.priority = random.choice((-(2**31), -1, 1, 2**31 - 1))
        if random.random() < 0.1:
            kind = random.choice(("json_schema", "regex", "grammar"))
            request.guide.CopyFrom(pb.Guide(**{kind: random.choice((*TEXTS, "{}", "[a-z]+", "(" * 50_000))}))
        return request

    def _tokenize(self) -> pb.TokenizeRequest:
        request = pb.TokenizeRequest(text=self._random.choice((*TEXTS, "a" * 1_000_000)))
        if self._random.random() < 0.3:
            request.chat.messages.add(role="user", content=self._random.choice(TEXTS))
        return request

    def _detokenize(self) -> pb.DetokenizeRequest:
        length = self._random.choice((0, 1, 100, 500_000))
        return pb.DetokenizeRequest(token_ids=[self._random.choice((5, VOCAB_SIZE, 2**32 - 1))] * length)

    # ---- router, internal ------------------------------------------------------------------------------------------

    def _internal_call(self) -> Outcome:
        random = self._random
        if random.random() < 0.4:
            # Field 0 exists in no message: an update that could be read would change who is a member.
            data = b"\x00" + raw_bytes(random)
            return self._call("control", self._internal, "/duopool.internal.v1.Control/Attach", [data])
        name = random.choice(ADMIN)
        messages = {
            "Scale": pb.ScaleRequest(pools={random.choice(("prefill", "x")): random.choice((0, 1, 2**32 - 1))}),
            "Drain": pb.DrainRequest(worker_id=random.choice(TEXTS)),
        }
        data = messages[name].SerializeToString() if name in messages else b""
        if random.random() < 0.6:
            data = random.choice((raw_bytes(random), mutated_bytes(random, data)))
        return self._call(f"admin {name}", self._internal, f"/duopool.v1.Admin/{name}", [data])

    # ---- workers ---------------------------------------------------------------------------------------------------

    def _session(self) -> Outcome:
        random = self._random
        role = random.choice(sorted(self._workers))
        info = self._target.workers[role]
        incarnation = info.incarnation if random.random() < 0.97 else random.choice(EDGES)
        kind = random.choice(("raw", "mutated bytes", "mutated", "mutated", "out of order", "out of order"))
        batches = []
        for _ in range(random.randint(1, 4)):
            batch = CommandBatch(commands=tuple(self._command() for _ in range(random.randint(1, 4))))
            if kind == "raw":
                batches.append(raw_bytes(random))
            elif kind == "mutated bytes":
                batches.append(mutated_bytes(random, codec.encode(batch)))
            elif kind == "mutated":
                batches.append(mutated_message(random, batch))
            else:
                batches.append(codec.encode(batch))
        if random.random() < 0.002:
            batches.append(bytes(codec.MAX_COMMANDS_BYTES + 1))
        metadata = (("incarnation", str(incarnation)),)
        return self._call(f"session {role} {kind}", self._workers[role], codec.SESSION_METHOD, batches, metadata)

    def _block_read(self) -> Outcome:
        random = self._random
        role = random.choice(sorted(self._workers))
        info = self._target.workers[role]
        lease_id, attempt = self._lease_id(), random.choice((1, 2, *EDGES))
        incarnation = info.incarnation if random.random() < 0.8 else Incarnation(random.choice(EDGES))
        method, message = random.choice(
            (
                (
                    codec.DESCRIBE_METHOD,
                    DescribeSource(transport=random.choice((*TEXTS, "grpc", "nixl", "shared_memory"))),
                ),
                (
                    codec.READ_METHOD,
                    ReadBlocks(lease_id=lease_id, incarnation=incarnation, attempt=attempt, blocks=self._blocks()),
                ),
                (
                    codec.VALIDATE_METHOD,
                    Validate(lease_id=lease_id, incarnation=incarnation, attempt=attempt, release=True),
                ),
            )
        )
        kind = random.choice(("raw", "mutated bytes", "mutated", "edges"))
        data = {
            "raw": lambda: raw_bytes(random),
            "mutated bytes": lambda: mutated_bytes(random, codec.encode(message)),
            "mutated": lambda: mutated_message(random, message),
            "edges": lambda: codec.encode(message),
        }[kind]()
        name = method.rpartition("/")[2]
        return self._call(f"source {role} {name} {kind}", self._workers[role], method, [data])

    def _command(self) -> Command:
        """A command that fits its type, for requests that may or may not be there."""
        random = self._random
        request_id = RequestId(random.choice(("f0", "f1", "f2", "", "x" * 5000, f"{random.getrandbits(128):032x}")))
        attempt = random.choice((1, 1, 2, 3, *EDGES[:-1]))
        match random.randrange(14):
            case 0 | 1 | 2:
                return Prefill(request=self._request(request_id), attempt=attempt, deadline_s=self._deadline())
            case 3 | 4 | 5:
                return Reserve(
                    request=self._request(request_id),
                    attempt=attempt,
                    local_prefill=random.random() < 0.5,
                    is_moving=random.random() < 0.2,
                    deadline_s=self._deadline(),
                )
            case 6 | 7:
                return self._blocks_ready(request_id, attempt)
            case 8:
                return Rebind(request_id=request_id, lease_id=self._lease_id(), attempt=attempt)
            case 9:
                return Cancel(request_id=request_id, attempt=attempt)
            case 10:
                return random.choice(
                    (
                        Heartbeat(lease_ids=(self._lease_id(),) * random.choice((0, 1, 2000))),
                        SnapshotWanted(),
                        LedgerWanted(audit_id=random.choice(EDGES[:-1])),
                    )
                )
            case 11:
                return Migrate(request_id=request_id, attempt=attempt, to_attempt=random.choice(EDGES[:-1]))
            case 12:
                return Stay(request_id=request_id, attempt=attempt)
            case _:
                return Copied(request_id=request_id, attempt=attempt, num_blocks=random.choice(EDGES[:-1]))

    def _request(self, request_id: RequestId) -> GenerationRequest:
        random = self._random
        token = random.choice((1, 5, VOCAB_SIZE - 1, VOCAB_SIZE, *EDGES[:-1]))
        length = random.choice((0, 1, 3, 17, 40, MAX_MODEL_LEN, 5000))
        params: dict[str, Any] = {"max_tokens": random.randint(1, 6), "temperature": random.choice((0.0, 1.0))}
        for _ in range(random.choice((0, 0, 0, 1, 2))):
            name = random.choice(("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"))
            params[name] = random.choice(EDGES[:-1])
            name = random.choice(("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"))
            params[name] = random.choice(FLOATS)
        if random.random() < 0.2:
            params["logit_bias"] = ((random.choice((0, VOCAB_SIZE, *EDGES[:-1])), random.choice(FLOATS)),)
        if random.random() < 0.1:
            params["stop_token_ids"] = (random.choice(EDGES[:-1]),) * random.choice((1, 3000))
        return GenerationRequest(
            request_id=request_id,
            prompt_token_ids=tuple(token if random.random() < 0.1 else at % 256 for at in range(length)),
            output_token_ids=(token,) * random.choice((0, 0, 0, 1, 300)),
            params=SamplingParams(**params),
            cache_salt=random.randbytes(random.choice((0, 0, 64, 5000))),
            priority=random.choice((0, 0, *EDGES[:-1])),
            choices=tuple(
                Choice(RequestId(random.choice(("f0", "f1", request_id, f"c{at}"))), random.choice((at, *EDGES[:-1])))
                for at in range(random.choice((0, 0, 0, 1, 3, 300)))
            ),
        )

    def _blocks_ready(self, request_id: RequestId, attempt: int) -> BlocksReady:
        random = self._random
        source = self._target.workers["prefill"]
        lease = LeaseRef(
            lease_id=self._lease_id(),
            worker_id=source.worker_id if random.random() < 0.5 else WorkerId(random.choice(TEXTS)),
            incarnation=source.incarnation if random.random() < 0.5 else Incarnation(random.choice(EDGES[:-1])),
            source_address=random.choice((source.address, source.address, "127.0.0.1:1", *TEXTS)),
        )
        first = Tokens(
            request_id=request_id,
            attempt=attempt,
            index=random.choice((0, 0, 1, *EDGES[:-1])),
            token_ids=(random.choice((1, VOCAB_SIZE, *EDGES[:-1])),) * random.choice((0, 1, 1, 3)),
            finish_reason=random.choice((None, None, FinishReason.STOP)),
        )
        return BlocksReady(
            request_id=request_id,
            attempt=attempt,
            lease=lease,
            first_block=random.choice((0, 0, 1, *EDGES[:-1])),
            blocks=self._blocks(),
            first_token=random.choice((None, first)),
            first_tokens=(first,) * random.choice((0, 0, 1, 3)),
            output=(random.choice((1, *EDGES[:-1])),) * random.choice((0, 0, 2)),
        )

    def _blocks(self) -> tuple[SealedBlock, ...]:
        random = self._random
        edges = EDGES[:-1]
        return tuple(
            SealedBlock(BlockId(random.choice((0, 1, 5, *edges))), random.choice(edges), random.choice(edges))
            for _ in range(random.choice((0, 1, 3, 3, 300)))
        )

    def _lease_id(self) -> LeaseId:
        return LeaseId(self._random.choice((1, self._random.getrandbits(63), *EDGES[:-1])))

    def _deadline(self) -> float | None:
        return self._random.choice((None, None, 1.0, *FLOATS))

    # ---- beside gRPC -----------------------------------------------------------------------------------------------

    def _http(self) -> Outcome:
        random = self._random
        path, body = random.choice(BODIES)
        if path.endswith("completions"):
            fields = random.sample(NUMBERS, random.randrange(3))
            body |= {field: random.choice((*EDGES, *FLOATS, 10**30, -(10**400))) for field in fields}
        data = json.dumps(mutated_value(random, body), default=repr).encode()
        if random.random() < 0.4:
            data = mutated_bytes(random, data)
        connection = http.client.HTTPConnection("127.0.0.1", self._target.http_port, timeout=CASE_TIMEOUT_S)
        try:
            connection.request("POST", path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        except TimeoutError:
            return Outcome(f"http {path}", "HANG")
        except (OSError, http.client.HTTPException) as error:
            return Outcome(f"http {path}", "CLOSED", repr(error))
        finally:
            connection.close()
        if answer.status == 500:
            return Outcome(f"http {path}", "INTERNAL", text[:200].decode(errors="replace"))
        is_json = answer.status == 200 and answer.headers.get_content_type() == "application/json"
        usage = json.loads(text).get("usage", {}) if is_json else {}
        return Outcome(f"http {path}", str(answer.status), num_tokens=usage.get("completion_tokens", 0))

    def _tcp(self) -> Outcome:
        """Bytes that are no HTTP/2, or stop being it, on any of the ports."""
        random = self._random
        addresses = [self._target.address, self._target.internal_address, f"127.0.0.1:{self._target.http_port}"]
        addresses += [info.address for info in self._target.workers.values()]
        host, _, port = random.choice(addresses).rpartition(":")
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        data = random.choice((b"", preface, preface + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")) + raw_bytes(random)
        with socket.create_connection((host, int(port)), timeout=CASE_TIMEOUT_S) as line, contextlib.suppress(OSError):
            line.sendall(data)
            line.shutdown(socket.SHUT_WR)
            line.settimeout(0.05)
            line.recv(4096)
        return Outcome("tcp", "CLOSED")

    # ---- calling ---------------------------------------------------------------------------------------------------

    def _call(
        self,
        kind: str,
        channel: Any,
        method: str,
        messages: Sequence[bytes],
        metadata: Sequence[tuple[str, str]] = (),
        *,
        leave_after: int | None = None,
    ) -> Outcome:
        """Send all messages, read everything; `leave_after` messages the caller goes away."""
        shown = () if channel is self._public else self._target.access.metadata
        call = channel.stream_stream(method)(iter(messages), metadata=(*metadata, *shown), timeout=CASE_TIMEOUT_S)
        num_tokens = 0
        with contextlib.suppress(grpc.RpcError):
            for number, message in enumerate(call):
                if method.endswith("/Generate"):
                    num_tokens += len(pb.GenerateResponse.FromString(message).tokens.token_ids)
                if leave_after is not None and number >= leave_after:
                    call.cancel()
                    break
        code = call.code()
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and "deadline passed" not in (call.details() or ""):
            return Outcome(kind, "HANG", call.details())
        return Outcome(kind, code.name, call.details() or "", num_tokens)
