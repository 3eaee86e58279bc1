"""docs/reference/ says what the .proto file and the OpenAPI document say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("name", ["grpc.md", "http.md"])
def test_the_reference_is_of_this_source(name: str) -> None:
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.pages()[name]
    assert "| `" in made
    assert made == (DOCS / "reference" / name).read_text(), "run: make reference"
