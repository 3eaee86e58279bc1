"""lm-eval: a task of ours through local-completions gives the scores of its own hf backend, item by item."""

from __future__ import annotations

import sys
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from system import HERE, HTTP, MODEL, MODEL_FOLDER

TASK = "duopool_facts"


def evaluate(model: str, arguments: dict[str, Any]) -> tuple[float, list[tuple[float, bool]]]:
    """(accuracy, [(log-likelihood, is greedy) of every choice])."""
    manager = TaskManager(include_path=str(HERE / "lm_eval_task"), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[TASK], task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
    scores = [(float(value), bool(greedy)) for sample in samples for ((value, greedy),) in sample["resps"]]
    return found["results"][TASK]["acc,none"], scores


own = evaluate("hf", {"pretrained": str(MODEL_FOLDER), "dtype": "float32", "device": "cpu", "batch_size": 4})
served = evaluate(
    "local-completions",
    {
        "model": MODEL,
        "base_url": f"{HTTP}/v1/completions",
        "tokenizer": str(MODEL_FOLDER),
        "tokenizer_backend": "huggingface",
        "num_concurrent": 4,
        "max_retries": 1,
        "batch_size": 4,
    },
)
print("accuracy", own[0], served[0], "items", len(own[1]), file=sys.stderr)
assert len(own[1]) == 36
assert own[0] == served[0]
assert [greedy for _, greedy in own[1]] == [greedy for _, greedy in served[1]]
worst = max(abs(a - b) for (a, _), (b, _) in zip(own[1], served[1], strict=True))
print("largest difference of a log-likelihood", worst, file=sys.stderr)
assert worst < 1e-3
