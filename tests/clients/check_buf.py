"""buf curl: health, reflection and Generate, by the schema that reflection gives."""

from __future__ import annotations

import json
import os

from system import GRPC, run

BUF = (os.environ["DUOPOOL_BUF"], "curl", "--protocol", "grpc", "--http2-prior-knowledge")
assert json.loads(run(*BUF, "-d", "{}", f"http://{GRPC}/grpc.health.v1.Health/Check")) == {"status": "SERVING"}
assert "duopool.v1.Inference/Generate" in run(*BUF, "--list-methods", f"http://{GRPC}").split()
asked = {"text": "The capital of France is", "sampling": {"max_tokens": 6, "temperature": 0, "ignore_eos": True}}
said = run(*BUF, "-d", json.dumps(asked), f"http://{GRPC}/duopool.v1.Inference/Generate")
decoder, events = json.JSONDecoder(), []
while said := said.strip():
    event, end = decoder.raw_decode(said)
    events.append(event)
    said = said[end:]
assert "started" in events[0]
assert sum(len(event["tokens"]["tokenIds"]) for event in events[1:-1]) == 6
assert events[-1]["finished"]["finishReason"] == "length"
