"""What the gateway asks once of a worker: the model, the pairing of the pools, the tokenizer's files."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from smg_grpc_proto import vllm_engine_pb2 as wire
from smg_grpc_proto.generated import common_pb2

from duopool.core.messages import WorkerInfo
from duopool.core.types import Role
from duopool.engine.model_source import TOKENIZER_FILES
from duopool.engine.served_model import ServedModel

CONNECTOR = "NixlConnector"
"""The gateway relays what a prefill worker answers to the decode worker, unread, if both say this."""
CHUNK_BYTES = 64 << 10


def model_info(info: WorkerInfo, model: ServedModel, folder: Path) -> Any:
    """The answer to `GetModelInfo`; `folder` is the checkpoint's."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return wire.GetModelInfoResponse(
        model_path=str(folder),
        tokenizer_path=str(folder),
        is_generation=True,
        max_context_length=model.max_model_len,
        max_req_input_len=model.max_model_len - 1,
        vocab_size=model.vocab_size,
        served_model_name=info.model,
        model_type=config.get("model_type", ""),
        architectures=config.get("architectures") or (),
        eos_token_ids=sorted(model.eos_token_ids),
        pad_token_id=config.get("pad_token_id") or 0,
        bos_token_id=config.get("bos_token_id") or 0,
    )


def server_info(info: WorkerInfo, *, num_requests: int, uptime_s: float, max_num_seqs: int) -> Any:
    """The answer to `GetServerInfo`: workers pair if model, format and block size are equal."""
    return wire.GetServerInfoResponse(
        server_type="duopool",
        active_requests=num_requests,
        uptime_seconds=uptime_s,
        kv_connector=CONNECTOR,
        kv_role="kv_producer" if info.role == Role.PREFILL else "kv_consumer",
        kv_engine_id=info.worker_id,
        data_parallel_size=1,
        kv_cache_dtype=info.dtype,
        model_dtype=info.dtype,
        block_size=info.block_size,
        pairing_protocol=f"duopool {info.layout_digest}",
        max_num_seqs=max_num_seqs,
    )


def tokenizer_chunks(folder: Path) -> Iterator[Any]:
    """The answer to `GetTokenizer`: a zip of the tokenizer's files, its digest with the last piece."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for pattern in ("config.json", "generation_config.json", *TOKENIZER_FILES):
            for file in sorted(folder.glob(pattern)):
                archive.write(file, file.name)
    data = buffer.getvalue()
    digest = sha256(data).hexdigest()
    for start in range(0, len(data), CHUNK_BYTES):
        is_last = start + CHUNK_BYTES >= len(data)
        yield common_pb2.GetTokenizerChunk(data=data[start : start + CHUNK_BYTES], sha256=digest if is_last else "")
