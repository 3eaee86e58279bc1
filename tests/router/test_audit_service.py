"""The `Admin.Audit` call: what workers and router say of each other, compared over the real sessions."""

from __future__ import annotations

import asyncio

from router_fakes import NUM_BLOCKS, FakeCluster, FakeWorker, eventually

from duopool.core.ledger import Holder, Owner
from duopool.core.messages import Prefill
from duopool.core.types import RequestId
from duopool.proto import inference_pb2 as pb


def request() -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 3]), sampling=pb.SamplingParams(max_tokens=400))


async def audited(cluster: FakeCluster, *, at_rest: bool = False) -> list[str]:
    answer = await cluster.admin.Audit(pb.AuditRequest(at_rest=at_rest))
    return [f"{one.where}: {one.subject} {one.problem}" for one in answer.findings]


def orphan(request_id: str, owner: Owner) -> Holder:
    return Holder(request_id=RequestId(request_id), attempt=1, phase="waiting", table=RequestId("t"), owner=owner)


def test_a_system_at_rest_and_one_under_load_agree_with_themselves() -> None:
    async def scenario() -> None:
        async with FakeCluster() as cluster:
            assert await audited(cluster, at_rest=True) == []
            for worker in cluster.workers:
                worker.mute = True
            calls = [cluster.inference.Generate(request()) for _ in range(4)]
            prefill = cluster.workers[0]
            await eventually(lambda: len(prefill.received(Prefill)) == 4)
            sent = prefill.received(Prefill)
            for worker in cluster.workers:
                worker.holders = [orphan(one.request.request_id, Owner.ASKER) for one in sent]
            assert await audited(cluster) == []
            assert len(await audited(cluster, at_rest=True)) == 1 + 2 * 4
            for call in calls:
                call.cancel()
            await eventually(lambda: cluster.router.pools.num_requests == 0)

    asyncio.run(scenario())


def test_requests_that_only_one_side_knows_are_named() -> None:
    async def scenario() -> None:
        async with FakeCluster() as cluster:
            prefill, decode = cluster.workers
            prefill.mute = decode.mute = True
            call = cluster.inference.Generate(request())
            await eventually(lambda: prefill.received(Prefill))
            (sent,) = prefill.received(Prefill)
            prefill.holders = [orphan("other", Owner.OTHER)]
            decode.holders = [orphan("mine", Owner.ASKER), orphan(sent.request.request_id, Owner.ASKER)]
            assert await audited(cluster) == [
                "decode-0: request mine/1 is waiting, unknown to its router",
                f"prefill-0: request {sent.request.request_id}/1 is prefilling there for the router, unknown to it",
            ]
            call.cancel()
            await eventually(lambda: cluster.router.pools.num_requests == 0)

    asyncio.run(scenario())


def test_a_worker_that_cannot_be_asked_is_named_and_the_others_are_audited() -> None:
    async def scenario() -> None:
        workers = [
            FakeWorker("prefill-0", "prefill"),
            FakeWorker("decode-0", "decode"),
            FakeWorker("decode-1", "decode"),
        ]
        async with FakeCluster(workers) as cluster:
            await workers[2].stop()
            await eventually(lambda: cluster.router.pools.num_ready("decode") == 1)
            answer = await cluster.admin.Audit(pb.AuditRequest())
            assert [(one.where, one.subject) for one in answer.findings] == [("decode-1", "session")]
            assert [one.name for one in answer.processes] == ["decode-0", "prefill-0", "router"]
            assert [one.free_blocks for one in answer.processes] == [NUM_BLOCKS, NUM_BLOCKS, 0]
            assert all(one.fds and one.threads and one.resident_bytes for one in answer.processes[2:])

    asyncio.run(scenario())
