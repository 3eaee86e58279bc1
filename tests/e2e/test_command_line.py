"""The installed command as a user runs it: processes, exit codes, output; with a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from calls import Load, complete, greedy_request, state
from remains import Remains

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]
# A user's: without the credential that tests of single parts are given.
INHERITED = {name: value for name, value in os.environ.items() if name != "DUOPOOL_CREDENTIAL"}
ENVIRONMENT = {**INHERITED, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "200"}
COMMAND = [sys.executable, "-m", "duopool.cluster"]


class Server:
    """`duopool serve` in a process."""

    def __init__(self, model: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [
                *COMMAND,
                "serve",
                "--model",
                str(model),
                "--port",
                "0",
                "--http-port",
                "0",
                "--num-blocks",
                "64",
                "--num-threads",
                "1",
                *options,
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        guard = threading.Timer(120, self.process.kill)
        guard.start()
        assert self.process.stdout is not None
        found = re.search(r" on (\S+:\d+) ", self.process.stdout.readline())
        guard.cancel()
        assert found is not None, "serve ended before it listened"
        self.address = found[1]

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(tiny_model: Path, nothing_remains: Remains) -> Iterator[Server]:
    running = Server(tiny_model, "--served-model-name", "tiny")
    nothing_remains.watch(running.address)
    yield running
    assert running.end(signal.SIGTERM) == 0


def duopool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False
    )


def test_generate_streams_text_and_gives_json(server: Server, tmp_path: Path) -> None:
    greedy = ["--temperature", "0", "--max-tokens", "12", "--ignore-eos", "--address", server.address]
    text = duopool("generate", "Once upon a time", *greedy)
    assert text.returncode == 0
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps("Once upon a time") + "\n\n" + json.dumps("two\nlines é") + "\n")
    answers = duopool("generate", "--prompt-file", str(prompts), "--json", *greedy)
    assert answers.returncode == 0
    first, second = map(json.loads, answers.stdout.splitlines())
    assert first["text"] == text.stdout.removesuffix("\n")
    assert first["usage"]["completion_tokens"] == len(first["token_ids"]) == len(second["token_ids"]) == 12
    assert first["times"]["total_s"] > 0
    assert first["decode_worker"] == "decode-0"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["x", "--top-p", "0"], 2, "top_p"),
        (["x", "--max-tokens", "-1"], 2, "max_tokens"),
        (["x", "--max-tokens", "100000"], 2, "max_tokens"),
        (["x", "--model", "other"], 1, "other"),
        (["x", "--prompt-file", "y"], 2, "PROMPT"),
        (["--prompt-file", "/nonexistent"], 2, "--prompt-file"),
    ],
)
def test_a_bad_request_is_one_line_that_names_the_field(
    server: Server, arguments: list[str], code: int, said: str
) -> None:
    answer = duopool("generate", *arguments, "--address", server.address)
    assert (answer.returncode, answer.stdout.strip()) == (code, "")
    assert said in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def test_nobody_there_is_said_in_one_line() -> None:
    for command in (["generate", "x"], ["status"]):
        answer = duopool(*command, "--address", "127.0.0.1:9")
        assert answer.returncode == 1
        assert "no router answers at 127.0.0.1:9" in answer.stderr
        assert len(answer.stderr.strip().splitlines()) == 1


def test_status_scale_and_drain(server: Server) -> None:
    grown = duopool("scale", "decode=2", "--address", server.address)
    assert grown.returncode == 0, grown.stderr
    assert _workers(server) == {"prefill-0", "decode-0", "decode-1"}
    drained = duopool("drain", "decode-0", "--address", server.address)
    assert drained.returncode == 0, drained.stderr
    assert "decode-0" not in _workers(server)
    shrunk = duopool("scale", "decode=1", "--address", server.address)
    assert shrunk.returncode == 0, shrunk.stderr
    for arguments, said in ((["scale", "decode=0"], "decode"), (["scale", "x"], "POOL=N"), (["drain", "z"], "'z'")):
        answer = duopool(*arguments, "--address", server.address)
        assert answer.returncode != 0
        assert said in answer.stderr


def test_a_rolling_restart_renews_every_worker_under_load(server: Server) -> None:
    prompts = [tuple(range(100 + at, 140 + at)) for at in range(4)]
    once = complete(server.address, [greedy_request(prompt, max_tokens=60) for prompt in prompts])
    old = {worker.pid for worker in state(server.address).workers}
    with Load(server.address, prompts, [tuple(record.token_ids) for record in once]) as load:
        restarted = duopool("restart", "--rolling", "--address", server.address)
    assert restarted.returncode == 0, restarted.stderr
    assert load.wrong == []
    new = state(server.address).workers
    assert sorted(worker.role for worker in new) == ["decode", "prefill"]
    assert not old & {worker.pid for worker in new}


def test_an_audit_of_a_sound_system_finds_nothing(server: Server) -> None:
    answer = duopool("audit", "--at-rest", "--address", server.address)
    assert answer.returncode == 0, answer.stderr
    for process in ("router", "prefill-", "decode-"):
        assert process in answer.stdout


def test_requests_aborted_at_any_phase_leave_nothing(server: Server) -> None:
    """What `make aborts` does with 10,000."""
    command = [sys.executable, str(ROOT / "benchmarks" / "aborts.py"), "--address", server.address]
    answer = subprocess.run(
        [*command, "--requests", "150", "--router-kills", "1", "--concurrency", "32", "--rest-limit-s", "20"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_a_model_that_is_not_there_ends_the_start(nothing_remains: Remains) -> None:
    answer = duopool("serve", "--model", "/nonexistent/model", "--port", "0")
    assert answer.returncode == 1
    assert "/nonexistent/model" in answer.stderr.splitlines()[-1]


def test_even_a_killed_server_leaves_nothing(tiny_model: Path) -> None:
    remains = Remains()
    server = Server(tiny_model)
    parts = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    server.process.wait()
    _, alive = psutil.wait_procs(parts, timeout=40)
    assert parts
    assert alive == []
    remains.watch(server.address)
    remains.check()


def _workers(server: Server) -> set[str]:
    answer = duopool("status", "--json", "--address", server.address)
    assert answer.returncode == 0, answer.stderr
    return {worker["worker_id"] for worker in json.loads(answer.stdout)["workers"]}
