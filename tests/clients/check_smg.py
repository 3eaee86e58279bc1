"""smg, the gateway: drives one prefill and one decode worker in its PD mode; openai's client talks to it alone."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from openai import OpenAI
from system import BIN, HTTP, MODEL

START_TIMEOUT_S = 60.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def pulled_blocks() -> float:
    """What the decode worker has ever read from the prefill worker."""
    with urllib.request.urlopen(f"{HTTP}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    (value,) = [
        line.split()[-1] for line in lines if line.startswith("duopool:worker_pulled_blocks") and "decode-0" in line
    ]
    return float(value)


def wait_until_ready(gateway: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while gateway.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/readiness", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError as error:
            if time.monotonic() > deadline:
                raise AssertionError("the gateway is not ready") from error
        time.sleep(0.2)
    raise AssertionError(f"the gateway ended with {gateway.returncode}")


port = free_port()
command = [
    *(BIN / "smg", "launch", "--host", "127.0.0.1", "--port", str(port), "--pd-disaggregation"),
    *("--prefill", f"grpc://{os.environ['DUOPOOL_SMG_PREFILL']}"),
    *("--decode", f"grpc://{os.environ['DUOPOOL_SMG_DECODE']}"),
    *("--prometheus-port", str(free_port()), "--worker-startup-check-interval", "1"),
]
gateway = subprocess.Popen([str(part) for part in command])
try:
    url = f"http://127.0.0.1:{port}"
    wait_until_ready(gateway, url)
    through, own = OpenAI(base_url=f"{url}/v1", api_key="none"), OpenAI(base_url=f"{HTTP}/v1", api_key="none")
    name = through.models.list().data[0].id
    messages = [{"role": "user", "content": "What is the capital of France?"}]

    def chat(client: OpenAI, model: str, **options: object) -> object:
        return client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_completion_tokens=24, **options
        )

    def text_of(client: OpenAI, model: str, prompt: str) -> str:
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0)
        return str(answer.choices[0].text)

    direct = chat(own, MODEL)
    before = pulled_blocks()
    answered = chat(through, name)
    deadline = time.monotonic() + 5
    while pulled_blocks() == before:  # told with the worker's next sign of life
        assert time.monotonic() < deadline, "the decode worker computed the prompt itself"
        time.sleep(0.1)
    assert answered.choices[0].message.content == direct.choices[0].message.content
    assert answered.usage.completion_tokens == direct.usage.completion_tokens
    streamed = "".join(
        chunk.choices[0].delta.content or "" for chunk in chat(through, name, stream=True) if chunk.choices
    )
    assert streamed == direct.choices[0].message.content
    stopped = through.completions.create(
        model=name, prompt="One, two, three, four,", max_tokens=16, stop=["six"], temperature=0
    )
    assert "six" not in stopped.choices[0].text
    assert stopped.choices[0].finish_reason == "stop"
    counts = [f"Count from {start} to {start + 5}." for start in range(8)]
    with ThreadPoolExecutor(len(counts)) as pool:
        both = [list(pool.map(partial(text_of, *end), counts)) for end in ((own, MODEL), (through, name))]
    assert both[0] == both[1], "all at once they differ"
finally:
    gateway.terminate()
    gateway.wait(timeout=20)
