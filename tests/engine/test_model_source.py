"""From names to folders: what is found, what is refused, and that a conversion happens once."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_models import FAMILIES, make

from duopool.core.errors import InvalidRequest, ModelNotFound, UnsupportedModel
from duopool.engine import gguf_conversion
from duopool.engine.model_loader import load_model
from duopool.engine.model_source import resolve_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make(FAMILIES["llama"]()).save_pretrained(folder)  # type: ignore[operator]
    return folder


def test_a_folder_is_itself(checkpoint: Path) -> None:
    assert resolve_model(str(checkpoint)).folder == checkpoint


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "", "a/b/c", "missing.gguf"])
def test_a_name_that_leads_nowhere_is_refused(name: str) -> None:
    with pytest.raises(ModelNotFound):
        resolve_model(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        resolve_model(str(tmp_path))


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelNotFound, match="pip install"):
        resolve_model("smollm2")


def test_racing_conversions_happen_once_and_are_seen_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions = []

    def convert(source: Path, folder: Path) -> None:
        conversions.append(source)
        (folder / "first").touch()
        time.sleep(0.05)
        (folder / "second").touch()

    monkeypatch.setattr(gguf_conversion, "_convert", convert)
    monkeypatch.setenv("DUOPOOL_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"weights")
    found: list[set[str]] = []

    def resolve() -> None:
        folder = resolve_model(str(file)).folder
        found.append({path.name for path in folder.iterdir()})

    threads = [threading.Thread(target=resolve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{"first", "second"}] * 4
    assert len(conversions) == 1
    file.write_bytes(b"weightz")
    resolve()
    assert len(conversions) == 2


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(_: Path, folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("disk full")

    monkeypatch.setattr(gguf_conversion, "_convert", convert)
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"weights")
    with pytest.raises(RuntimeError, match="disk full"):
        gguf_conversion.convert_once(file, tmp_path / "cache", lambda _: None)
    assert [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == []


def test_loading_reports_the_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    model = load_model(checkpoint, dtype="bfloat16", max_model_len=64)
    assert model.eos_token_ids == {2, 9}
    assert (model.max_model_len, str(model.dtype)) == (64, "torch.bfloat16")
    assert load_model(checkpoint).max_model_len == 128
    with pytest.raises(InvalidRequest, match="128"):
        load_model(checkpoint, max_model_len=129)


def test_a_checkpoints_own_code_never_runs(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "modeling.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedModel, match="never run"):
        load_model(checkpoint)
    assert "modeling" not in sys.modules
