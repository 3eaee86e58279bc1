"""What locust's users do."""

from __future__ import annotations

from locust import HttpUser, constant, task


class Reader(HttpUser):
    wait_time = constant(0.1)

    @task
    def complete(self) -> None:
        asked = {"prompt": "The capital of France is", "max_tokens": 8}
        with self.client.post("/v1/completions", json=asked, catch_response=True) as answer:
            if answer.json()["usage"]["completion_tokens"] > 8:
                answer.failure("too many tokens")

    @task
    def chat(self) -> None:
        asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "stream": True}
        with self.client.post("/v1/chat/completions", json=asked, stream=True, catch_response=True) as answer:
            if [line for line in answer.iter_lines() if line][-1:] != [b"data: [DONE]"]:
                answer.failure("the stream did not end")
