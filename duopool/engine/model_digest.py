"""Names what the KV of a token prefix is a function of, besides the tokens: the namespace of block keys.

Workers with equal digests may exchange blocks. Weights are read in samples: enough to tell fine-tunes of one model
apart without reading gigabytes at every start.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from duopool.engine.model_source import TOKENIZER_FILES

SAMPLES_PER_FILE = 64
SAMPLE_BYTES = 4096


def model_digest(folder: Path, *, dtype: str) -> str:
    """32 hex digits over configuration, names, sizes and samples of the weights, and the dtype they run in."""
    digest = hashlib.blake2b(f"duopool-model-1:{dtype}".encode(), digest_size=16)
    digest.update((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for index in range(SAMPLES_PER_FILE):
                file.seek(index * max(0, size - SAMPLE_BYTES) // (SAMPLES_PER_FILE - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """32 hex digits over the folder's tokenizer files: equal where token ids mean the same text."""
    digest = hashlib.blake2b(b"duopool-tokenizer-1", digest_size=16)
    files = sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)})
    for path in files:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
