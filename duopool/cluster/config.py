"""What one serving system consists of: pools, model, router, Ray. Validated once, by the command line or a test."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from duopool.cluster.pools import index_of
from duopool.core.config import (
    MAX_POOL_SIZE,
    CacheConfig,
    DeviceName,
    HandoffConfig,
    InternalConfig,
    ModelConfig,
    QuantizationName,
    RouterConfig,
    SchedulerConfig,
    TlsFiles,
    WorkerConfig,
)
from duopool.core.types import Role, WorkerId

MAX_ROUTERS = 16


class SupervisorConfig(BaseModel):
    """Timers of the supervisor, in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tick_s: float = Field(default=0.25, gt=0)
    ping_s: float = Field(default=0.5, gt=0)
    ping_timeout_s: float = Field(default=15.0, gt=0)
    """A worker that answers no ping for this long is replaced, even if its process still exists."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Placing a worker, importing and loading the model may take this long."""
    drain_timeout_s: float = Field(default=120.0, gt=0)
    """A draining worker is stopped after this long even if it still holds requests."""
    backoff_s: float = Field(default=0.5, gt=0)
    """Wait before the first replacement; doubles with every failure up to `max_backoff_s`."""
    max_backoff_s: float = Field(default=30.0, gt=0)
    stable_s: float = Field(default=60.0, gt=0)
    """A worker that was ready for this long starts with a clean record when it fails."""


class ClusterConfig(BaseModel):
    """One serving system."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill: int = Field(default=1, ge=1, le=MAX_POOL_SIZE)
    decode: int = Field(default=1, ge=1, le=MAX_POOL_SIZE)
    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    handoff: HandoffConfig = HandoffConfig()
    supervisor: SupervisorConfig = SupervisorConfig()
    internal: InternalConfig = InternalConfig()
    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    http_port: int | None = Field(default=0, ge=0, le=65535)
    """Port of the OpenAI-compatible HTTP face; 0 lets the system choose, None means no such face."""
    routers: int = Field(default=1, ge=1, le=MAX_ROUTERS)
    """Router processes, each with sessions to all workers; the ports of the others follow those of the first."""
    max_num_waiting_tokens: int = Field(default=RouterConfig().max_num_waiting_tokens, ge=1)
    max_wait_s: float = Field(default=RouterConfig().max_wait_s, gt=0)
    metrics_prefix: str = RouterConfig().metrics_prefix
    tls: TlsFiles | None = None
    api_keys_file: str | None = None
    internal_host: str = "127.0.0.1"
    internal_port: int = Field(default=0, ge=0, le=65535)
    ray_address: str | None = None
    """Ray cluster to join; a private local one is started when None."""
    pin_pools: bool = False
    """Place workers on nodes of their pool only, before the first such node has been seen too."""
    num_threads: int | None = Field(default=None, ge=1)
    """Compute threads of each worker; as many as the driver may use when None."""
    decode_model: str | None = None
    """Checkpoint that the decode pool takes its weights from; tokenizer and names stay those of `model`."""
    decode_quantization: QuantizationName | None = None
    """Of the decode pool, which waits for memory; prefill waits for arithmetic and keeps the checkpoint's weights."""
    smg_port: int | None = Field(default=None, ge=0, le=65535)
    """First port of the VllmEngine protocol: `prefill-N` listens on it + 2 N, `decode-N` on it + 2 N + 1."""
    prefill_device: DeviceName = "auto"
    """`auto`: on GPUs where Ray has any and torch can use them, else on the CPU."""
    decode_device: DeviceName = "auto"
    num_gpus_per_worker: float | None = Field(default=None, ge=0, le=1)
    """Share of a GPU per worker on one; when None as much as lets all workers fit on what Ray has."""

    @model_validator(mode="after")
    def _can_round(self) -> Self:
        if self.decode_quantization and self.decode_device == "cuda":
            raise ValueError("decode.quantization rounds weights for the CPU, and decode.device is cuda")
        return self

    @property
    def wanted(self) -> dict[Role, int]:
        """Initial size of each pool."""
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode}

    @property
    def devices(self) -> dict[Role, DeviceName]:
        """What was asked for each pool. Weights are rounded on the CPU only."""
        decode = "cpu" if self.decode_quantization and self.decode_device == "auto" else self.decode_device
        return {Role.PREFILL: self.prefill_device, Role.DECODE: decode}

    def worker(
        self,
        worker_id: WorkerId,
        role: Role,
        *,
        host: str,
        num_threads: int,
        shares_cores: bool,
        device: DeviceName = "cpu",
        gpu_share: float = 1.0,
    ) -> WorkerConfig:
        """Configuration of one worker; `gpu_share` counts where it computes on a GPU."""
        is_decode = role is Role.DECODE
        weights = {"weights": self.decode_model, "quantization": self.decode_quantization} if is_decode else {}
        return WorkerConfig(
            role=role,
            worker_id=worker_id,
            model=self.model.model_copy(update=weights),
            cache=self.cache.model_copy(
                update={"memory_share": 1 / (self.prefill + self.decode), "gpu_share": gpu_share}
            ),
            scheduler=self.scheduler,
            handoff=self.handoff,
            internal=self.internal,
            host=host,
            device=device,
            num_threads=num_threads,
            shares_cores=shares_cores,
            smg_port=None if self.smg_port is None else _following(self.smg_port, _smg_offset(worker_id, role)),
        )

    def router(self, number: int = 0) -> RouterConfig:
        """Configuration of one router, counted from 0."""
        return RouterConfig(
            model=self.model,
            handoff=self.handoff,
            host=self.host,
            port=_following(self.port, number),
            http_port=None if self.http_port is None else _following(self.http_port, number),
            block_size=self.cache.block_size,
            max_num_waiting_tokens=self.max_num_waiting_tokens,
            max_wait_s=self.max_wait_s,
            metrics_prefix=self.metrics_prefix,
            internal=self.internal,
            tls=self.tls,
            api_keys_file=self.api_keys_file,
            internal_host=self.internal_host,
            internal_port=_following(self.internal_port, number),
        )


def _following(port: int, number: int) -> int:
    """A port behind the first one; one that the system chooses stays so."""
    return port + number if port else 0


def _smg_offset(worker_id: WorkerId, role: Role) -> int:
    """Places keep their port through every restart, and pools may grow."""
    return 2 * index_of(worker_id) + (role is Role.DECODE)
