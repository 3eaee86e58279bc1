"""The house rules of docs/architecture.md: links at the root, folders without __init__, imports that only go down."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "duopool"
LINKED = ("cluster", "prefill_worker", "decode_worker", "router", "kernels", "proto")

FLOORS: dict[str, set[str]] = {
    "core": {"core"},
    "kernels": {"kernels"},
    "proto": {"proto", "core"},
    "engine": {"engine", "core", "kernels", "proto"},
    "prefill_worker": {"prefill_worker", "core", "engine", "proto"},
    "decode_worker": {"decode_worker", "core", "engine", "proto"},
    "router": {"router", "core", "proto"},
}
"""What each floor may import from; `cluster` and the client stand on top and may import anything."""

NEVER: dict[str, set[str]] = {
    "core": {"torch", "ray", "grpc", "triton", "transformers"},
    "kernels": {"ray", "grpc", "transformers"},
    "proto": {"torch", "ray", "triton", "transformers"},
    "router": {"torch", "ray", "triton"},
}
"""Libraries that must not be imported anywhere in a floor."""


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "_pb2" not in path.name]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


@pytest.mark.parametrize("name", LINKED)
def test_root_folder_is_a_link_into_the_package(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert link.resolve() == PACKAGE / name
    assert not list(link.resolve().rglob("__init__.py")), "a linked folder must stay a namespace package"


def test_imports_only_go_down() -> None:
    wrong = []
    for path in sources():
        allowed = FLOORS.get(floor_of(path))
        for module in imports(path):
            parts = module.split(".")
            if allowed is not None and parts[0] == "duopool" and len(parts) > 1 and parts[1] not in allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_libraries_stay_where_they_belong() -> None:
    wrong = []
    for path in sources():
        floor, relative = floor_of(path), path.relative_to(PACKAGE)
        for module in imports(path):
            library = module.split(".")[0]
            if library in NEVER.get(floor, set()) and not (floor == "kernels" and library == "torch"):
                wrong.append(f"{relative} imports {library}")
            if library == "ray" and path.name != "actor.py" and floor != "cluster":
                wrong.append(f"{relative} imports ray: only actor.py and cluster/ may")
            if library == "triton" and floor != "kernels":
                wrong.append(f"{relative} imports triton: only kernels/ may")
            if library == "pickle":
                wrong.append(f"{relative} imports pickle: nothing is pickled")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["core.messages", "kernels.ops", "engine.runner", "engine.transfer.factory"])
def test_lower_floors_import_without_ray_and_grpc(module: str) -> None:
    code = f"import sys; sys.modules['ray'] = None; sys.modules['grpc'] = None\nimport duopool.{module}\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("name", ["kernels", "proto"])
def test_bare_import_never_finds_this_repository(name: str, tmp_path: Path) -> None:
    """`kernels` and `proto` belong to other distributions; installed, ours must only be found below `duopool`."""
    code = (
        "import importlib.util as u, pathlib, sys\n"
        f"spec = u.find_spec({name!r})\n"
        "places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]\n"
        f"root = pathlib.Path({str(ROOT)!r})\n"
        "assert not any(p and pathlib.Path(p).resolve().is_relative_to(root / 'duopool') for p in places), places\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=60)


def test_each_test_module_has_a_name_of_its_own() -> None:
    """Folders of tests are no packages: pytest refuses to collect a second module of the same name."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
