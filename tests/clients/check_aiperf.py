"""aiperf: a small profile of streamed chats, with the token counts that the server reports."""

from __future__ import annotations

import json
import os
from pathlib import Path

from system import BIN, HTTP, MODEL, run

# Offline, aiperf looks for the tokenizer in the hub's cache alone; else it takes the folder of that name.
os.environ.pop("HF_HUB_OFFLINE", None)
run(
    *(BIN / "aiperf", "profile", "--model-names", MODEL, "--url", HTTP, "--endpoint-type", "chat", "--streaming"),
    *("--tokenizer", MODEL, "--concurrency", 2, "--request-count", 6, "--synthetic-input-tokens-mean", 64),
    *("--output-tokens-mean", 12, "--extra-inputs", "ignore_eos:true", "--use-server-token-count"),
    *("--artifact-dir", "artifacts", "--ui", "simple"),
)
report = json.loads(Path("artifacts/profile_export_aiperf.json").read_text())
assert report["request_count"]["avg"] == 6
assert report["error_summary"] == []
assert report["total_usage_completion_tokens"]["avg"] == 6 * 12
