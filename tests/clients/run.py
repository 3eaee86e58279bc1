"""Starts a system with the real model and lets foreign clients, unmodified, talk to it: `make clients`.

Every check is a script of its own that ends with 0 or says what is wrong; it runs in a folder of its own with the
Python of its environment. `run.py NAME…` runs only those.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from duopool.cluster.config import ClusterConfig
from duopool.cluster.system import System
from duopool.core.config import CacheConfig, ModelConfig
from duopool.engine.model_source import resolve_model

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = Path(os.environ.get("DUOPOOL_CLIENTS", HERE.parents[1] / ".venv-clients"))
CHECKS = {
    "langchain": "apis",
    "litellm": "apis",
    "lm_eval": "apis",
    "locust": "apis",
    "buf": "apis",
    "schemathesis": "apis",
    "guidellm": "load",
    "aiperf": "load",
    "smg": "gateway",
}
"""Name of the check, and the environment it runs in."""
TIMEOUT_S = 240.0


def main(wanted: list[str]) -> int:
    names = wanted or list(CHECKS)
    folder = resolve_model("smollm2").folder
    config = ClusterConfig(
        port=0, http_port=0, model=ModelConfig(dtype="float32"), cache=CacheConfig(num_blocks=1000), smg_port=0
    )
    failed = []
    with System.start(config, report=lambda stage, text: print(f"{stage:>8}  {text}", flush=True)) as system:
        told = {
            "DUOPOOL_HTTP": system.routers[0].http_url or "",
            "DUOPOOL_GRPC": system.address,
            **{f"DUOPOOL_SMG_{info.role.upper()}": info.notes[-1].split()[-1] for info in system.view.members},
            "DUOPOOL_MODEL_FOLDER": str(folder),
            "DUOPOOL_BUF": str(ENVIRONMENTS / "npm/node_modules/.bin/buf"),
            "HF_HUB_OFFLINE": "1",
            "OPENAI_API_KEY": "none",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
        for name in names:
            began = time.monotonic()
            problem = check(name, told, folder)
            print(f"{'FAIL' if problem else 'pass'}  {name}  {time.monotonic() - began:.0f} s", flush=True)
            if problem:
                failed.append(name)
                print(problem, flush=True)
    print(f"{len(names) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def check(name: str, told: dict[str, str], model_folder: Path) -> str:
    """What is wrong; empty if nothing is."""
    with tempfile.TemporaryDirectory(prefix=f"duopool-{name}-") as place:
        (Path(place) / "smollm2").symlink_to(model_folder)
        shutil.copy(HERE / "lm_eval_task/duopool_facts.jsonl", place)
        environment = {**os.environ, **told, "HOME": place, "PYTHONPATH": str(HERE)}
        command = [str(ENVIRONMENTS / CHECKS[name] / "bin/python"), str(HERE / f"check_{name}.py")]
        try:
            done = subprocess.run(
                command, cwd=place, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        sys.stdout.write(done.stderr if name == "lm_eval" and done.returncode == 0 else "")
        return "" if done.returncode == 0 else f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
