"""What the source must never do: unpickle, run a checkpoint's code, or open an internal port without its guard."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import duopool

PACKAGE = Path(duopool.__file__).resolve().parent
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNPICKLING_CALLS = {"torch.load", "ray.cloudpickle.loads", "numpy.load", "np.load"}
GUARDED = {"grpc.aio.server", "grpc.server"}
MAKES_SERVERS = {"proto/internal_access.py", "router/server.py"}
"""Behind the credential, and behind API keys."""
OPEN_SERVERS = {"engine/smg/service.py"}
"""Speak a protocol that knows no credential, on a port that is off unless asked for; see docs/security.md."""


def trees() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if "_pb2" not in path.name:
            yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_nothing_is_pickled() -> None:
    wrong = []
    for name, tree in trees():
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            wrong += [f"{name} imports {module}" for module in modules if module.split(".")[0] in PICKLERS]
            if isinstance(node, ast.Call) and ast.unparse(node.func) in UNPICKLING_CALLS:
                wrong.append(f"{name}:{node.lineno} calls {ast.unparse(node.func)}")
    assert wrong == []


def test_no_checkpoint_brings_code_along() -> None:
    told = []
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                told.append(ast.unparse(node.value))
                assert told[-1] == "False", f"{name} trusts a checkpoint's code"
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("snapshot_download"):
                patterns = {keyword.arg for keyword in node.keywords}
                assert "allow_patterns" in patterns, f"{name}:{node.lineno} downloads everything, Python files too"
    assert told, "nobody says it any more: the default might change"


def test_every_server_has_its_guard() -> None:
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in GUARDED and name not in OPEN_SERVERS:
                assert name in MAKES_SERVERS, f"{name}:{node.lineno} makes a server of its own"
                assert "interceptors" in {keyword.arg for keyword in node.keywords}
