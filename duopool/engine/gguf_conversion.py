"""Turns a GGUF file into a Hugging Face folder once, and finds it there ever after.

Owns the cache entry of a file and its lock. The entry appears by one rename, so a reader sees all of it or nothing; a
second process that asks meanwhile waits for the lock and then finds the entry.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FORMAT = 2
"""Raised when what a conversion writes changes, so that older entries are left alone."""


def convert_once(gguf_file: Path, cache: Path, report: Callable[[str], None]) -> Path:
    """The folder with this file's weights as bfloat16 safetensors and its tokenizer; made now if it is not there."""
    target = cache / "models" / f"{gguf_file.stem}-{_fingerprint(gguf_file)}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_suffix(".lock")):
        if target.is_dir():
            return target
        report(f"converting {gguf_file.name} (once, about half a minute)")
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            _convert(gguf_file, staging)
            staging.chmod(0o755)
            staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _convert(gguf_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # De-quantised in float32 and rounded once: in bfloat16 the scales and sums would be rounded as well.
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    # The loaded model still carries the GGUF quantizer and cannot be saved: its weights move to a model without one.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = {name: weight.to(torch.bfloat16) for name, weight in loaded.state_dict().items()}
    fresh.load_state_dict(weights, assign=True)
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fingerprint(file: Path) -> str:
    """Names the file's content by its size, head and tail: reading all of a large file would cost a start."""
    size = file.stat().st_size
    digest = hashlib.blake2b(f"{FORMAT}:{size}".encode(), digest_size=6)
    with file.open("rb") as stream:
        digest.update(stream.read(1 << 20))
        stream.seek(max(0, size - (1 << 20)))
        digest.update(stream.read())
    return digest.hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an advisory lock between processes; it ends with the process, whatever happens to it."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
