"""What digests cost a transfer: reads of the same pages with and without the check, one after the other, in pairs.

Two processes on one machine; pages of SmolLM2-135M's size. The ratio of each pair is taken, so that what else runs here
weighs on both sides alike.

usage: digest_cost.py [--pairs N] [--pages N]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from unittest import mock

sys.path += [str(Path(__file__).parents[1] / "tests" / "transfer")]

import numpy as np
from transfer_fakes import FakeStore, start_source

from duopool.core.messages import LeaseRef, SealedBlock
from duopool.core.types import BlockId, Incarnation, LeaseId, WorkerId
from duopool.engine.transfer import grpc_reader, nixl_reader
from duopool.engine.transfer.digest import seal
from duopool.engine.transfer.factory import available_transports, make_reader
from duopool.engine.transfer.in_process import InProcessNetwork
from duopool.engine.transfer.transport import BlockReader, ReadOutcome
from duopool.kernels.cpu_library import library

PAGE_BYTES = 737_280
"""30 layers of 3 heads of 64 keys and values, 16 tokens, float32."""
NUM_BLOCKS = 64
SEED = 7


def serve(transport: str) -> None:
    """The other process: one lease over all pages, until stdin ends."""
    store = FakeStore(num_blocks=NUM_BLOCKS, page_bytes=PAGE_BYTES, seed=SEED)
    source = start_source(transport, InProcessNetwork(), incarnation=SEED, store=store)
    source.lease(1, list(range(NUM_BLOCKS)))
    source.keeper.now -= 1e6
    print(source.address, flush=True)
    sys.stdin.readline()
    source.stop()


def read_s(reader: BlockReader, lease: LeaseRef, blocks: tuple[SealedBlock, ...]) -> float:
    """Seconds from asking to the answer."""
    outcome: Future[ReadOutcome] = Future()
    began_at = time.perf_counter()
    reader.read(lease, 1, blocks, [BlockId(index) for index in range(len(blocks))], outcome.set_result)
    assert not outcome.result(60).error
    return time.perf_counter() - began_at


def no_fault(*_: object) -> str:
    """In place of a check. A plain function: calls of a mock take long enough to show."""
    return ""


def copy_unchecked(
    sealed: list[int],
    source_address: int,
    sources: list[int],
    target_address: int,
    targets: list[int],
    *,
    page_bytes: int,
) -> list[int]:
    """`ops.copy_pages` if nobody asked for digests: the same loop without the products. Answers `sealed`."""
    froms, tos = np.asarray(sources, dtype=np.int64), np.asarray(targets, dtype=np.int64)
    cpu = library()
    assert cpu is not None, "this measures the compiled kernels"
    cpu.calls.duopool_copy_pages(
        source_address, target_address, page_bytes, froms.ctypes.data, tos.ctypes.data, len(froms), None
    )
    return sealed


def measure(transport: str, *, num_pairs: int, num_pages: int) -> str:
    """Median cost over pairs, and the speeds behind it."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", transport], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lease = LeaseRef(
        lease_id=LeaseId(1),
        worker_id=WorkerId("prefill-0"),
        incarnation=Incarnation(SEED),
        source_address=process.stdout.readline().strip(),
    )
    held = FakeStore(num_blocks=NUM_BLOCKS, page_bytes=PAGE_BYTES, seed=SEED)
    blocks = seal(held, [BlockId(index) for index in range(num_pages)], [1] * num_pages)
    sealed = [block.digest for block in blocks]
    store = FakeStore(num_blocks=NUM_BLOCKS, page_bytes=PAGE_BYTES, seed=99)
    reader = make_reader(transport, store, worker_id=WorkerId("decode-0"), incarnation=Incarnation(1))  # type: ignore[arg-type]
    try:
        read_s(reader, lease, blocks)
        with_digest, without, ratios = [], [], []
        for pair in range(num_pairs):
            for checks in (True, False) if pair % 2 else (False, True):
                if checks:
                    with_digest.append(read_s(reader, lease, blocks))
                    continue
                with (
                    mock.patch.object(nixl_reader, "find_mismatch", no_fault),
                    mock.patch.object(grpc_reader.GrpcReader, "_fault", no_fault),
                    mock.patch.object(reader, "_copy_pages", partial(copy_unchecked, sealed), create=True),
                ):
                    without.append(read_s(reader, lease, blocks))
            ratios.append(with_digest[-1] / without[-1])
    finally:
        reader.close()
        process.communicate("\n", timeout=30)
    num_bytes = num_pages * PAGE_BYTES
    began_at = time.perf_counter()
    seal(held, [BlockId(index) for index in range(num_pages)], [1] * num_pages)
    digest_s = time.perf_counter() - began_at
    return (
        f"{transport}: {num_pages} pages, {num_bytes / 1e6:.1f} MB: {100 * (statistics.median(ratios) - 1):+.1f} % "
        f"(median of {num_pairs} pairs; best {1e3 * min(with_digest):.2f} ms with digests, {1e3 * min(without):.2f} ms "
        f"without: {100 * (min(with_digest) / min(without) - 1):+.1f} %); digests alone {1e3 * digest_s:.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--pages", type=int, default=16)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    for transport in available_transports():
        print(measure(transport, num_pairs=options.pairs, num_pages=options.pages), flush=True)


if __name__ == "__main__":
    main()
