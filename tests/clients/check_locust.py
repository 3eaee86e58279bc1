"""locust: simulated users, whole answers and streams; no failure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from system import BIN, HERE, HTTP, run

run(
    *(BIN / "locust", "--headless", "--locustfile", HERE / "locustfile.py", "--host", HTTP, "--users", 4),
    *("--spawn-rate", 4, "--run-time", "12s", "--stop-timeout", "20", "--json-file", "locust", "--only-summary"),
)
report = json.loads(Path("locust.json").read_text())
totals = {entry["name"]: (entry["num_requests"], entry["num_failures"]) for entry in report}
print(totals, file=sys.stderr)
assert set(totals) == {"/v1/completions", "/v1/chat/completions"}
assert all(requests > 0 and failures == 0 for requests, failures in totals.values())
