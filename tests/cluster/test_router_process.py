"""The router's process: whose terminal keys reach it, and with whom it shares the cores."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from duopool.cluster.router_process import Listening, RouterProcess
from duopool.core.config import RouterConfig

LISTENS = """
import time
print('{"port": 1, "http_port": 0, "internal_port": 2}', flush=True)
time.sleep(60)
"""


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RouterProcess:
    """Of a module that says that it listens, and nothing else."""
    (tmp_path / "listens.py").write_text(LISTENS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return RouterProcess(RouterConfig(), module="listens")


def test_a_router_is_out_of_the_reach_of_ctrl_c_and_in_the_scheduling_group_of_its_system(
    process: RouterProcess,
) -> None:
    process.launch()
    try:
        while (listening := process.poll()) is None:
            time.sleep(0.01)
        assert listening == Listening(port=1, http_port=0, internal_port=2)
        assert os.getpgid(process.pid) == process.pid, "a terminal's keys reach a process group"
        assert os.getsid(process.pid) == os.getsid(0), "cores are shared out by sessions first"
    finally:
        process.stop()
    assert process.pid == 0
