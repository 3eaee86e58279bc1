"""Configuration, validated once at the edge. Names follow vLLM's flags; inside, fields are trusted."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from duopool.core.types import Role

DTypeName = Literal["auto", "float32", "bfloat16"]
QuantizationName = Literal["int8", "int4"]
DeviceName = Literal["auto", "cpu", "cuda"]
TransportName = Literal["auto", "shared_memory", "nixl", "grpc"]


MAX_POOL_SIZE = 256
"""Workers of one pool."""


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Config):
    """Which model is served, and as what."""

    model: str = "smollm2"
    """`smollm2` (embedded), a Hugging Face folder, a hub name, or a .gguf file."""
    served_model_name: str | None = None
    dtype: DTypeName = "auto"
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest prompt plus output in tokens; the model's own limit when None."""
    weights: str | None = None
    """Another checkpoint of the same model, whose weights are run in place of the model's own."""
    quantization: QuantizationName | None = None
    """Round the weights at load; see docs/benchmarks.md for what that costs in quality."""


class CacheConfig(_Config):
    """The paged KV store of one worker."""

    block_size: int = Field(default=16, ge=1, le=256)
    """Tokens per block."""
    num_blocks: int | None = Field(default=None, ge=1)
    """Pages in the store; sized from `kv_cache_memory_bytes` when None."""
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1 << 20)
    """Sized from the memory there is when None."""
    kv_memory_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Part of the host's memory that the KV stores of all its workers may take together."""
    memory_share: float = Field(default=1.0, gt=0, le=1)
    """This worker's share of that; the cluster says how many workers there are."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Part of a GPU's memory that all its workers may take together, weights included."""
    gpu_share: float = Field(default=1.0, gt=0, le=1)
    """This worker's share of that."""


class SchedulerConfig(_Config):
    """Bounds of one step."""

    max_num_batched_tokens: int = Field(default=512, ge=1)
    """Token budget of a step: the chunk size of a long prompt."""
    max_num_seqs: int = Field(default=64, ge=1)
    max_num_waiting: int = Field(default=1024, ge=1)
    """Requests a worker holds that have not begun; past it new ones are refused."""
    max_num_waiting_tokens: int = Field(default=1 << 20, ge=1)
    """Tokens still to be prefilled for the requests it holds; past it new ones are refused."""
    watermark: float = Field(default=0.01, ge=0, lt=1)
    """Share of the decode pool kept free at admission, so that running requests can grow."""


class HandoffConfig(_Config):
    """Timers and transport of the handoff; see docs/architecture.md."""

    transport: TransportName = "auto"
    """How pages travel. `auto`: between processes of one host by `shared_memory`, else by `nixl` where it imports, else
    by `grpc`. What cannot be read the way that is asked for is read over gRPC."""
    heartbeat_s: float = Field(default=0.5, gt=0)
    lease_ttl_s: float = Field(default=5.0, gt=0)
    orphan_ttl_s: float = Field(default=1.7, gt=0)
    """A worker stops the requests of a router that it has not heard from for this long."""
    progress_watchdog_s: float = Field(default=1.8, gt=0)
    """A worker that says nothing for this long is given up: noticed within 2 s, whenever it fell silent."""
    max_retries: int = Field(default=3, ge=0)
    """Attempts after the first, per request."""
    retry_share: float = Field(default=0.1, ge=0)
    """Further attempts of all requests together, as a share of the requests; what is beyond waits."""
    retries_per_s: float = Field(default=10.0, gt=0)
    """Further attempts that are always allowed."""
    retry_burst: int = Field(default=256, ge=1)
    """Further attempts at once, as after a worker's death."""
    local_prefill_max_tokens: int = Field(default=64, ge=0)
    """A remainder of at most this many uncached tokens may be prefilled on D."""


class TlsFiles(_Config):
    """PEM files of one side of a connection."""

    certificate: str
    key: str
    ca: str | None = None
    """Who must have signed the other side's certificate; without it a server asks for none."""


class InternalConfig(_Config):
    """How routers, workers, supervisor and operators know each other; see docs/security.md. Paths only, no secrets."""

    credential_file: str | None = None
    """Holds the cluster credential; the environment variable DUOPOOL_CREDENTIAL comes first."""
    tls: TlsFiles | None = None
    """Both sides show this certificate, and both check the other's against `ca`."""

    @model_validator(mode="after")
    def _is_mutual(self) -> Self:
        if self.tls is not None and self.tls.ca is None:
            raise ValueError("TLS between routers and workers is mutual: name a certificate authority")
        return self


class WorkerConfig(_Config):
    """All that one worker process needs."""

    role: Role
    worker_id: str
    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    handoff: HandoffConfig = HandoffConfig()
    internal: InternalConfig = InternalConfig()
    host: str = "127.0.0.1"
    """Address this worker listens on and is reached at; ports are chosen by the system."""
    device: DeviceName = "cpu"
    """Where it computes; `auto`: on CUDA if torch has it in this process. Only a worker that is sure to compute on the
    CPU shares a loaded model with its successors."""
    num_threads: int | None = Field(default=None, ge=1)
    shares_cores: bool = True
    """With the other pool: prefill steps then stand behind decode steps, and decode steps wait for bursts."""
    smg_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of the VllmEngine protocol for the smg gateway; 0 lets the system choose, None means it is not served."""


class RouterConfig(_Config):
    """All that one router process needs."""

    model: ModelConfig = ModelConfig()
    handoff: HandoffConfig = HandoffConfig()
    internal: InternalConfig = InternalConfig()
    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    """For clients."""
    http_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of the OpenAI-compatible HTTP face; 0 lets the system choose, None means no such face."""
    tls: TlsFiles | None = None
    """Of the public ports; with `ca` clients must show a certificate that it signed."""
    api_keys_file: str | None = None
    """`TENANT KEY` a line; the environment variable DUOPOOL_API_KEYS comes first. Without keys none is asked for."""
    internal_host: str = "127.0.0.1"
    internal_port: int = Field(default=0, ge=0, le=65535)
    """For the supervisor and operators; 0 lets the system choose."""
    max_num_requests: int = Field(default=1024, ge=1)
    """Requests alive at once; past it new ones get RESOURCE_EXHAUSTED."""
    max_num_waiting_tokens: int = Field(default=1 << 18, ge=1)
    """Prompt tokens of accepted requests that do not decode yet; past it new ones get RESOURCE_EXHAUSTED."""
    max_wait_s: float = Field(default=300.0, gt=0)
    """A request that would wait longer than this before it decodes is refused at once, with a deadline or without."""
    max_message_bytes: int = Field(default=4 << 20, ge=1024)
    max_unread_tokens: int = Field(default=256, ge=1)
    """Tokens that a client who does not read may leave behind what gRPC itself holds, before its stream is ended."""
    block_size: int = Field(default=16, ge=1, le=256)
    metrics_prefix: str = Field(default="duopool", pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*$")
    """First part of every metric's name, before the colon."""
