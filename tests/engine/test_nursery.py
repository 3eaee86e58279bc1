"""A nursery forks one worker after another over the same model, and nothing outlives its host."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from tiny_models import FAMILIES, make

from duopool.core.config import CacheConfig, DeviceName, HandoffConfig, InternalConfig, ModelConfig, WorkerConfig
from duopool.core.types import Role
from duopool.engine.nursed_process import NursedProcess, WorkerEnded, WorkerRaised


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make(FAMILIES["llama"](), dtype=torch.float32).save_pretrained(folder)
    return folder


def process_of(
    folder: Path, tmp_path: Path, *, device: DeviceName = "cpu", module: str = "duopool.decode_worker.process"
) -> NursedProcess:
    credential = tmp_path / "credential"
    credential.write_text("a credential of a test, long enough to pass\n")
    credential.chmod(0o600)
    config = WorkerConfig(
        role=Role.DECODE,
        worker_id="decode-0",
        model=ModelConfig(model=str(folder), dtype="float32"),
        cache=CacheConfig(num_blocks=16),
        handoff=HandoffConfig(transport="grpc"),
        internal=InternalConfig(credential_file=str(credential)),
        device=device,
        num_threads=2,
    )
    return NursedProcess(config, module)


@pytest.fixture
def nursed(folder: Path, tmp_path: Path) -> Iterator[NursedProcess]:
    process = process_of(folder, tmp_path)
    yield process
    process.stop()


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_dead_worker_is_followed_by_another_incarnation(nursed: NursedProcess) -> None:
    first = nursed.start()
    nursed.check()
    assert nursed.is_idle()
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(first.pid))
    with pytest.raises(WorkerEnded):
        nursed.is_idle()
    second = nursed.start()
    assert second.incarnation != first.incarnation
    assert second.pid != first.pid
    assert (second.model_digest, second.layout_digest) == (first.model_digest, first.layout_digest)
    assert nursed.info() == second
    nursed.check()


def test_collections_look_at_what_a_worker_makes_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at what came with the nursery, which is shared with it page by page and lives as long."""
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH")))))
    process = process_of(folder, tmp_path, module="collecting_worker")
    process.start()
    process.check()
    process.stop()


def test_a_stopped_worker_does_not_outlive_its_host(folder: Path, tmp_path: Path) -> None:
    process = process_of(folder, tmp_path)
    info = process.start()
    os.kill(info.pid, signal.SIGSTOP)
    process.stop()
    until(lambda: not psutil.pid_exists(info.pid))


def test_a_model_that_cannot_be_served_is_told_to_the_host(tmp_path: Path) -> None:
    process = process_of(tmp_path / "nothing", tmp_path)
    with pytest.raises((WorkerRaised, WorkerEnded), match="nothing"):
        process.start()
    process.stop()


@pytest.mark.skipif(torch.cuda.is_available(), reason="`cuda` is to be had here")
def test_a_worker_that_finds_no_cuda_says_what_it_was_asked_for(folder: Path, tmp_path: Path) -> None:
    process = process_of(folder, tmp_path, device="cuda")
    with pytest.raises(WorkerRaised, match=r"device: cuda was asked for, and torch .* finds no CUDA device"):
        process.start()
    process.stop()
