"""guidellm: a small benchmark with streams; all requests succeed and the token counts are what was asked for."""

from __future__ import annotations

import json
from pathlib import Path

from system import BIN, HTTP, MODEL, run

run(
    *(BIN / "guidellm", "run", "--backend", f"kind=openai_http,target={HTTP},model={MODEL}"),
    *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"),
    *("--tokenizer", f"kind=hf_auto,model={MODEL}"),
    *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=12"),
    *("--output", "kind=json,path=report.json", "--disable-console"),
)
(benchmark,) = json.loads(Path("report.json").read_text())["benchmarks"]
assert benchmark["metrics"]["request_totals"] == {"successful": 6, "errored": 0, "incomplete": 0, "total": 6}
