"""Workers come and go under a stream; the client sees every token once, in order, and the stream it would have seen."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from router_fakes import FakeCluster, FakeWorker, eventually, expected_output

from duopool.core.handoff.request import POISON_LIMIT, Member
from duopool.core.messages import (
    Cancel,
    Heartbeat,
    KvChanged,
    KvStoredSegment,
    Migrate,
    NackReason,
    Prefill,
    Rebind,
    Reserve,
    SnapshotWanted,
    Stay,
)
from duopool.core.types import BlockKey, Incarnation
from duopool.proto import inference_pb2 as pb
from duopool.proto.status import read_status
from duopool.router.evacuation import MAX_TRIES

PROMPT = [7, 7, 7, 1, 2, 3]


def four(**settings: object) -> list[FakeWorker]:
    return [FakeWorker(f"{role}-{n}", role, **settings) for role in ("prefill", "decode") for n in range(2)]


def request(max_tokens: int = 40, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=PROMPT), sampling=pb.SamplingParams(max_tokens=max_tokens, seed=5), **fields
    )


class Reading:
    """Reads a stream in the background and checks that indices have neither gap nor repeat."""

    def __init__(self, call) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.started: pb.Started | None = None
        self.finished: pb.Finished | None = None
        self.task = asyncio.create_task(self._read(call))

    async def _read(self, call) -> None:
        async for response in call:
            if response.HasField("started"):
                assert self.started is None
                self.started = response.started
            elif response.HasField("tokens"):
                assert response.tokens.index == len(self.token_ids)
                self.token_ids += response.tokens.token_ids
                self.text += response.tokens.text
            else:
                self.finished = response.finished

    async def check(self, num_tokens: int = 40) -> pb.Finished:
        await self.task
        assert self.token_ids == expected_output(PROMPT, num_tokens)
        assert self.text == "".join(map(chr, self.token_ids))
        assert self.finished is not None
        assert self.finished.usage.completion_tokens == num_tokens
        return self.finished


def busy(workers: list[FakeWorker], role: str) -> FakeWorker | None:
    return next((worker for worker in workers if worker.role == role and worker.running), None)


def test_a_lost_decode_worker_costs_no_token() -> None:
    async def run() -> None:
        async with FakeCluster(four(step_s=0.005)) as cluster:
            reading = Reading(cluster.inference.Generate(request()))
            await eventually(lambda: len(reading.token_ids) > 8)
            lost = busy(cluster.workers, "decode")
            assert lost is not None
            await lost.stop()
            finished = await reading.check()
            assert finished.decode_worker != lost.worker_id
            assert finished.attempts == 2

    asyncio.run(run())


async def read_choices(call, until=lambda outputs: False) -> dict[int, list[int]]:
    """Tokens by choice, of which none is missing and none comes twice; stops early when `until` says so."""
    outputs: dict[int, list[int]] = {}
    async for response in call:
        if response.HasField("tokens"):
            output = outputs.setdefault(response.tokens.choice, [])
            assert response.tokens.index == len(output)
            output += response.tokens.token_ids
        if until(outputs):
            call.cancel()
            break
    return outputs


def several(num_choices: int, max_tokens: int = 40) -> pb.GenerateRequest:
    asked = request(max_tokens)
    asked.sampling.n = num_choices
    return asked


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_a_worker_lost_at_any_time_costs_no_choice_a_token(role: str, num_tokens: int) -> None:
    async def run() -> None:
        async with FakeCluster(four(step_s=0.01)) as cluster:
            seen: dict[int, list[int]] = {}

            def watch(outputs: dict[int, list[int]]) -> bool:
                seen.update(outputs)
                return False

            reading = asyncio.create_task(read_choices(cluster.inference.Generate(several(3)), watch))
            await eventually(lambda: busy(cluster.workers, role) is not None or len(seen.get(0, ())) > num_tokens)
            await eventually(lambda: len(seen.get(0, ())) >= num_tokens)
            lost = busy(cluster.workers, role) or next(one for one in cluster.workers if one.role == role)
            await lost.stop()
            assert await reading == dict.fromkeys(range(3), expected_output(PROMPT, 40))

    asyncio.run(run())


def test_a_busy_decode_worker_makes_the_carrier_go_elsewhere_with_what_is_computed() -> None:
    async def run() -> None:
        workers = four(step_s=0.01)
        workers[2].refuse = NackReason.BUSY
        async with FakeCluster(workers) as cluster:
            for _ in range(3):
                outputs = await read_choices(cluster.inference.Generate(several(3, 5)))
                assert outputs == dict.fromkeys(range(3), expected_output(PROMPT, 5))
            prefills = [command for worker in workers for command in worker.received(Prefill)]
            assert len({command.request.request_id for command in prefills}) == 3

    asyncio.run(run())


def test_several_choices_go_on_behind_what_each_has_delivered() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            whole = expected_output(PROMPT, 9)
            asked = several(3, 9)
            asked.resume_choices.extend(pb.TokenIds(ids=whole[:length]) for length in (4, 0, 9))
            outputs: dict[int, list[int]] = {0: whole[:4], 1: [], 2: whole}
            ended = []
            async for response in cluster.inference.Generate(asked):
                if response.HasField("tokens"):
                    assert response.tokens.index == len(outputs[response.tokens.choice])
                    outputs[response.tokens.choice] += response.tokens.token_ids
                elif response.HasField("finished"):
                    ended.append((response.finished.choice, response.finished.usage.completion_tokens))
            assert outputs == dict.fromkeys(range(3), whole)
            assert sorted(ended) == [(0, 9), (1, 9), (2, 9)]

    asyncio.run(run())


@pytest.mark.parametrize("field", ["resume_from", "resume_choices"])
def test_what_is_resumed_must_fit_the_choices(field: str) -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            asked = several(3)
            asked.resume_from.ids.extend([1] if field == "resume_from" else [])
            asked.resume_choices.extend([pb.TokenIds(ids=[1])] if field == "resume_choices" else [])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_choices(cluster.inference.Generate(asked))
            assert read_status(caught.value).field == field

    asyncio.run(run())


def test_a_call_of_several_choices_that_is_given_up_leaves_nothing() -> None:
    async def run() -> None:
        async with FakeCluster(four(step_s=0.01)) as cluster:
            for num_tokens in (0, 1, 5):
                call = cluster.inference.Generate(several(4))
                await read_choices(call, lambda outputs, most=num_tokens: len(outputs.get(0, ())) >= most)
                await eventually(lambda: cluster.router.pools.num_requests == 0)
                await eventually(lambda: not any(worker.running for worker in cluster.workers))
            assert cluster.router.pools.lives == ()

    asyncio.run(run())


def test_a_lost_prefill_worker_is_replaced_before_the_first_token() -> None:
    async def run() -> None:
        async with FakeCluster(four(step_s=0.1)) as cluster:
            reading = Reading(cluster.inference.Generate(request(5)))
            await eventually(lambda: busy(cluster.workers, "prefill") is not None)
            lost = busy(cluster.workers, "prefill")
            assert lost is not None
            await lost.stop()
            assert (await reading.check(5)).prefill_worker != lost.worker_id

    asyncio.run(run())


def test_a_worker_that_falls_silent_is_given_up() -> None:
    async def run() -> None:
        async with FakeCluster(four(step_s=0.02)) as cluster:
            reading = Reading(cluster.inference.Generate(request()))
            await eventually(lambda: len(reading.token_ids) > 3)
            silent = busy(cluster.workers, "decode")
            assert silent is not None
            silent.frozen = True
            assert (await reading.check()).decode_worker != silent.worker_id
            silent.frozen = False
            await eventually(lambda: cluster.router.pools.num_ready("decode") == 2)

    asyncio.run(run())


def test_a_worker_whose_steps_stand_still_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duopool.router.session.STALL_FACTOR", 1.0)

    async def run() -> None:
        async with FakeCluster(four(step_s=0.02)) as cluster:
            reading = Reading(cluster.inference.Generate(request()))
            await eventually(lambda: len(reading.token_ids) > 3)
            stalled = busy(cluster.workers, "decode")
            assert stalled is not None
            stalled.stalled = True
            assert (await reading.check()).decode_worker != stalled.worker_id

    asyncio.run(run())


def test_a_decode_worker_that_refuses_is_replaced_and_the_lease_rebound() -> None:
    async def run() -> None:
        async with FakeCluster(four()) as cluster:
            refusing = cluster.workers[2:]
            refusing[0].refuse = refusing[1].refuse = NackReason.BUSY
            for worker in cluster.workers[:2]:
                worker.step_s = 0.01
            reading = Reading(cluster.inference.Generate(request(6)))
            await eventually(lambda: any(worker.received(Reserve) for worker in refusing))
            refusing[0].refuse = refusing[1].refuse = None
            assert (await reading.check(6)).attempts >= 2

    asyncio.run(run())


def test_a_lease_is_given_to_another_decode_worker() -> None:
    async def run() -> None:
        async with FakeCluster(four()) as cluster:
            for worker in cluster.workers[2:]:
                worker.mute = True  # takes the request and never joins
            reading = Reading(cluster.inference.Generate(request(6)))
            await eventually(lambda: reading.token_ids)
            holder = next(worker for worker in cluster.workers[2:] if worker.received(Reserve))
            prefill = next(worker for worker in cluster.workers[:2] if worker.received(Prefill))
            await eventually(lambda: any(beat.lease_ids for beat in prefill.received(Heartbeat)))
            for worker in cluster.workers[2:]:
                worker.mute = False
            await holder.stop()
            finished = await reading.check(6)
            assert len(prefill.received(Rebind)) == 1
            assert sum(len(worker.received(Prefill)) for worker in cluster.workers[:2]) == 1
            assert finished.decode_worker != holder.worker_id
            await eventually(lambda: not prefill.received(Heartbeat)[-1].lease_ids)

    asyncio.run(run())


@pytest.mark.parametrize("forgetful", ["prefill-0", "decode-0"])
def test_a_worker_that_lives_and_has_lost_the_request_is_left_for_another(forgetful: str) -> None:
    async def run() -> None:
        async with FakeCluster(four()) as cluster:
            (loser,) = (worker for worker in cluster.workers if worker.worker_id == forgetful)
            loser.is_forgetful = True
            finished = [await Reading(cluster.inference.Generate(request(6))).check(6) for _ in range(2)]
            assert any(loser.received(kind) for kind in (Prefill, Reserve))
            assert max(one.attempts for one in finished) == 2

    asyncio.run(run())


def test_a_request_waits_for_a_worker_to_come_back() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            decode = cluster.workers[1]
            await decode.stop()
            await eventually(lambda: cluster.router.pools.num_ready("decode") == 0)
            reading = Reading(cluster.inference.Generate(request(6)))
            await eventually(lambda: cluster.router.pools.num_requests == 1)
            await decode.start()
            await reading.check(6)

    asyncio.run(run())


def test_nobody_to_serve_is_unavailable_after_a_while() -> None:
    async def run() -> None:
        async with FakeCluster(route_wait_s=0.2) as cluster:
            await cluster.workers[0].stop()
            await eventually(lambda: cluster.router.pools.num_ready("prefill") == 0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await cluster.inference.Generate(request()).read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert read_status(caught.value).reason == "UNAVAILABLE"

    asyncio.run(run())


def test_a_request_that_takes_worker_after_worker_down_is_not_tried_again() -> None:
    async def run() -> None:
        workers = [*four(step_s=30), FakeWorker("prefill-2", "prefill", step_s=30)]
        async with FakeCluster(workers) as cluster:
            reading = Reading(cluster.inference.Generate(request()))
            for _ in range(POISON_LIMIT):
                await eventually(lambda: busy(cluster.workers, "prefill"))
                worker = busy(cluster.workers, "prefill")
                assert worker is not None
                await worker.stop()
            await eventually(lambda: cluster.router.pools.num_ready("prefill") == 0)
            assert not reading.task.done()  # they might only be out of reach
            cluster.workers = [worker for worker in cluster.workers if worker.role == "decode"]
            cluster.tell_members()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await reading.task
            status = read_status(caught.value)
            # No code that makes clients try again.
            assert (status.code, status.reason) == (grpc.StatusCode.INTERNAL, "SUSPECTED_POISON")

    asyncio.run(run())


def test_a_worker_whose_stream_breaks_again_and_again_is_not_taken_for_dead() -> None:
    async def run() -> None:
        prefill, decode = FakeWorker("prefill-0", "prefill", step_s=30), FakeWorker("decode-0", "decode")
        async with FakeCluster([prefill, decode]) as cluster:
            reading = Reading(cluster.inference.Generate(request(6)))
            for number in range(POISON_LIMIT):
                await eventually(lambda: prefill.running)
                await prefill.stop()
                await eventually(lambda: cluster.router.pools.num_ready("prefill") == 0)
                prefill.step_s = 30.0 * (number + 1 < POISON_LIMIT)
                await prefill.start()
            await reading.check(6)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (NackReason.TOO_LARGE, grpc.StatusCode.INVALID_ARGUMENT),
        (NackReason.DEADLINE, grpc.StatusCode.DEADLINE_EXCEEDED),
        (NackReason.INTERNAL, grpc.StatusCode.INTERNAL),
        (NackReason.TRANSFER_FAILED, grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_a_refusal_becomes_the_fitting_code(reason: NackReason, code: grpc.StatusCode) -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            cluster.workers[0].refuse = reason
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await Reading(cluster.inference.Generate(request())).task
            assert caught.value.code() is code
            await eventually(lambda: cluster.workers[1].received(Cancel))
            cluster.workers[0].refuse = None
            await Reading(cluster.inference.Generate(request(6))).check(6)

    asyncio.run(run())


def test_what_was_accepted_waits_for_a_busy_worker_however_often_it_refuses() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            prefill = cluster.workers[0]
            prefill.refuse = NackReason.BUSY
            reading = Reading(cluster.inference.Generate(request(6)))
            more_than_retries = cluster.config.handoff.max_retries + 2
            await eventually(lambda: len(prefill.received(Prefill)) > more_than_retries)
            prefill.refuse = None
            await reading.check(6)

    asyncio.run(run())


def test_a_client_continues_a_stream_with_what_it_has() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            whole = expected_output(PROMPT, 40)
            for num_had in (1, 17, 39, 40):
                tokens, text = [], ""
                had = pb.TokenIds(ids=whole[:num_had])
                async for response in cluster.inference.Generate(request(resume_from=had)):
                    if response.HasField("tokens"):
                        assert response.tokens.index == num_had + len(tokens)
                        tokens += response.tokens.token_ids
                        text += response.tokens.text
                assert whole[:num_had] + tokens == whole
                assert text == "".join(map(chr, tokens))
                assert response.finished.finish_reason == "length"
                assert response.finished.usage.completion_tokens == 40

    asyncio.run(run())


def test_a_restarted_worker_is_a_new_member() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            decode = cluster.workers[1]
            await decode.stop()
            decode.incarnation = Incarnation(decode.incarnation + 1)
            await decode.start()
            cluster.tell_members()
            await eventually(lambda: cluster.router.pools.num_ready("decode") == 1)
            await Reading(cluster.inference.Generate(request(6))).check(6)
            assert len(cluster.router.pools.members) == 2

    asyncio.run(run())


def test_a_draining_worker_hands_on_what_it_has_and_gets_nothing_new() -> None:
    async def run() -> None:
        async with FakeCluster(four(step_s=0.01)) as cluster:
            reading = Reading(cluster.inference.Generate(request()))
            await eventually(lambda: busy(cluster.workers, "decode") is not None)
            draining = busy(cluster.workers, "decode")
            assert draining is not None
            draining.draining = True
            cluster.tell_members()
            others = [Reading(cluster.inference.Generate(request(6))) for _ in range(6)]
            for other in others:
                assert (await other.check(6)).decode_worker != draining.worker_id
            finished = await reading.check()
            assert finished.decode_worker != draining.worker_id
            assert not draining.running
            assert len(draining.received(Migrate)) == 1
            computed = [one for worker in cluster.workers for one in worker.received(Prefill)]
            assert len(computed) == 1 + len(others), "a prefix was computed again"

    asyncio.run(run())


def test_a_request_that_cannot_move_leaves_by_its_tokens() -> None:
    async def run() -> None:
        async with FakeCluster(four(step_s=0.02)) as cluster:
            reading = Reading(cluster.inference.Generate(request()))
            await eventually(lambda: busy(cluster.workers, "decode") is not None)
            draining = busy(cluster.workers, "decode")
            assert draining is not None
            (other,) = [worker for worker in cluster.workers[2:] if worker is not draining]
            other.refuse = NackReason.TRANSFER_FAILED
            draining.draining = True
            cluster.tell_members()
            await eventually(lambda: len(draining.received(Stay)) == MAX_TRIES)
            other.refuse = None
            assert (await reading.check()).decode_worker == other.worker_id

    asyncio.run(run())


def test_what_is_left_when_a_drain_ends_leaves_by_its_tokens() -> None:
    async def run() -> None:
        async with FakeCluster(four(step_s=0.03)) as cluster:
            reading = Reading(cluster.inference.Generate(request()))
            await eventually(lambda: busy(cluster.workers, "decode") is not None)
            draining = busy(cluster.workers, "decode")
            assert draining is not None
            (other,) = [worker for worker in cluster.workers[2:] if worker is not draining]
            other.mute = True  # takes the shadow and never copies
            draining.draining, draining.drain_s = True, 0.4
            cluster.tell_members()
            await eventually(lambda: draining.received(Cancel))
            other.mute = False
            assert (await reading.check()).decode_worker == other.worker_id
            assert len(draining.received(Migrate)) == 1
            assert sum(len(worker.received(Prefill)) for worker in cluster.workers[:2]) == 2

    asyncio.run(run())


def test_the_last_decode_worker_keeps_its_requests_until_another_one_is_there() -> None:
    async def run() -> None:
        last, next_one = FakeWorker("decode-0", "decode", step_s=0.01), FakeWorker("decode-1", "decode", step_s=0.01)
        async with FakeCluster([FakeWorker("prefill-0", "prefill"), last]) as cluster:
            reading = Reading(cluster.inference.Generate(request()))
            await eventually(lambda: last.running)
            last.draining = True
            cluster.tell_members()
            num_before = len(reading.token_ids)
            await eventually(lambda: len(reading.token_ids) > num_before + 5)
            assert last.running
            await next_one.start()
            cluster.workers.append(next_one)
            cluster.tell_members()
            assert (await reading.check()).decode_worker == next_one.worker_id

    asyncio.run(run())


def test_missed_news_of_a_worker_are_asked_for() -> None:
    async def run() -> None:
        async with FakeCluster() as cluster:
            decode = cluster.workers[1]
            segment = KvStoredSegment(parent=None, keys=(BlockKey(b"k" * 16),))
            decode.say(KvChanged(sequence=5, stored=(segment,)))
            await eventually(lambda: decode.received(SnapshotWanted))
            assert Member(decode.worker_id, decode.incarnation) in {
                cluster.router.pools.member_of(info) for info in cluster.router.pools.members
            }

    asyncio.run(run())
