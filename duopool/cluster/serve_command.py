"""`duopool serve`: start a system and keep it until a signal comes."""

from __future__ import annotations

import importlib.util
import signal
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from pydantic import ValidationError

from duopool.cluster.config import ClusterConfig
from duopool.cluster.settings import read_file
from duopool.cluster.system import System
from duopool.cluster.terminal import EXIT_FAILED, EXIT_USAGE, clear_errors, complain, err, out, progress, set_up_logging
from duopool.core.config import (
    CacheConfig,
    HandoffConfig,
    InternalConfig,
    ModelConfig,
    RouterConfig,
    SchedulerConfig,
    TlsFiles,
)


class DType(StrEnum):
    """Number format of weights, activations and KV."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Quantization(StrEnum):
    """Weights of few bits."""

    int8 = "int8"
    int4 = "int4"


class Device(StrEnum):
    """Where a pool computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class TransportChoice(StrEnum):
    """How KV blocks travel."""

    auto = "auto"
    shared_memory = "shared_memory"
    nixl = "nixl"
    grpc = "grpc"


def serve(
    model: Annotated[
        str, typer.Option(help="'smollm2' (embedded), a Hugging Face folder, a hub name or a .gguf file.")
    ] = "smollm2",
    served_model_name: Annotated[str | None, typer.Option(help="Name clients use; --model when not given.")] = None,
    prefill: Annotated[int, typer.Option(min=1, help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Decode workers.")] = 1,
    routers: Annotated[
        int, typer.Option(min=1, help="Router processes; the ports of the others follow those of the first.")
    ] = 1,
    host: Annotated[str, typer.Option(help="Address the router listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the router; 0 lets the system choose.")] = 50051,
    http: Annotated[bool, typer.Option(help="Also serve the OpenAI-compatible HTTP interface.")] = True,
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the HTTP interface; 0 lets the system choose.")
    ] = 8000,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            help="File of mode 0600 with 'TENANT KEY' lines: clients must show a key, tenants share no cached prefix. "
            "DUOPOOL_API_KEYS may hold the lines instead."
        ),
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM certificate of the public ports.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its PEM key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM authority that must have signed the certificates of clients.")
    ] = None,
    internal_host: Annotated[
        str, typer.Option(help="Address for operators' commands (status, scale, drain); they need the credential.")
    ] = "127.0.0.1",
    internal_port: Annotated[int, typer.Option(min=0, max=65535, help="Their port; 0 lets the system choose.")] = 0,
    credential_file: Annotated[
        Path | None,
        typer.Option(
            help="Cluster credential, made with mode 0600 if missing [~/.cache/duopool/credential]; "
            "other hosts need the same file, or its content in DUOPOOL_CREDENTIAL."
        ),
    ] = None,
    internal_tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM certificate, for the name duopool.internal, of every router and worker.")
    ] = None,
    internal_tls_key: Annotated[Path | None, typer.Option(help="Its PEM key.")] = None,
    internal_tls_ca: Annotated[Path | None, typer.Option(help="PEM authority that must have signed it.")] = None,
    dtype: Annotated[DType, typer.Option(help="Number format of weights, activations and KV.")] = DType.auto,
    decode_model: Annotated[
        str | None,
        typer.Option(
            "--decode.model", help="Another checkpoint of the same model, quantized for example, for the decode pool."
        ),
    ] = None,
    decode_quantization: Annotated[
        Quantization | None,
        typer.Option("--decode.quantization", help="Round the decode pool's weights to 8 or 4 bits (CPU)."),
    ] = None,
    prefill_device: Annotated[
        Device,
        typer.Option(
            "--prefill.device", help="Where prefill workers compute; auto: cuda where Ray has GPUs, else cpu."
        ),
    ] = Device.auto,
    decode_device: Annotated[
        Device, typer.Option("--decode.device", help="The same for decode workers.")
    ] = Device.auto,
    num_gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Part of a GPU per worker on cuda; as much as lets all workers fit if not given."
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Part of a GPU's memory for all its workers together, weights included.")
    ] = 0.9,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt plus output in tokens; the model's limit if not given.")
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, max=256, help="Tokens per KV block.")] = 16,
    num_blocks: Annotated[
        int | None, typer.Option(min=1, help="KV blocks per worker; from --kv-cache-memory-bytes if not given.")
    ] = None,
    kv_cache_memory_bytes: Annotated[
        int | None,
        typer.Option(min=1 << 20, help="KV memory per worker in bytes; from --kv-memory-fraction if not given."),
    ] = None,
    kv_memory_fraction: Annotated[
        float, typer.Option(help="Part of the host's memory for the KV blocks of all its workers on the CPU.")
    ] = 0.1,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Token budget of a step: the chunk size of a long prompt.")
    ] = 512,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests in one step of a worker.")] = 64,
    max_num_waiting_tokens: Annotated[
        int,
        typer.Option(min=1, help="Prompt tokens that may wait at a router; past it requests are refused at once."),
    ] = RouterConfig().max_num_waiting_tokens,
    max_wait_s: Annotated[
        float,
        typer.Option(help="A request that would wait longer than these seconds before it decodes is refused at once."),
    ] = RouterConfig().max_wait_s,
    transport: Annotated[
        TransportChoice,
        typer.Option(
            help="How KV blocks travel; auto: shared_memory on one host, else nixl where it imports, else grpc."
        ),
    ] = TransportChoice.auto,
    num_threads: Annotated[
        int | None, typer.Option(min=1, help="Compute threads per worker; all cores if not given.")
    ] = None,
    metrics_prefix: Annotated[
        str, typer.Option(help="First part of every metric's name; 'vllm' makes boards of vLLM fit.")
    ] = "duopool",
    smg_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Also let the smg gateway drive the pools: prefill-N listens on this port + 2N, decode-N on it "
            "+ 2N + 1; 0 lets the system choose. Needs the extra 'smg'; these ports ask for no key.",
        ),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster to join; a private one is started here if not given.")
    ] = None,
    pin_pools: Annotated[
        bool,
        typer.Option(
            "--pin-pools",
            help="Wait for nodes with a Ray resource named after a worker's pool; else pools are pinned as soon as one "
            "such node is there.",
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=read_file,
            help="YAML file with these settings, one 'name: value' a line; flags and DUOPOOL_* variables come first.",
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what supervisor and router do.")] = False,
) -> None:
    """Start Ray, the workers of both pools and the router; serve until Ctrl-C or SIGTERM."""
    set_up_logging(verbose=verbose)
    if smg_port is not None and importlib.util.find_spec("smg_grpc_proto") is None:
        complain("--smg-port needs the package smg-grpc-proto: pip install 'duopool[smg]'")
        raise typer.Exit(EXIT_USAGE)
    try:
        wanted = ClusterConfig(
            prefill=prefill,
            decode=decode,
            routers=routers,
            model=ModelConfig(
                model=model, served_model_name=served_model_name, dtype=dtype.value, max_model_len=max_model_len
            ),
            cache=CacheConfig(
                block_size=block_size,
                num_blocks=num_blocks,
                kv_cache_memory_bytes=kv_cache_memory_bytes,
                kv_memory_fraction=kv_memory_fraction,
                gpu_memory_utilization=gpu_memory_utilization,
            ),
            scheduler=SchedulerConfig(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs),
            handoff=HandoffConfig(transport=transport.value),
            internal=InternalConfig(
                credential_file=_path(credential_file),
                tls=_tls_files(internal_tls_certificate, internal_tls_key, internal_tls_ca),
            ),
            host=host,
            port=port,
            http_port=http_port if http else None,
            max_num_waiting_tokens=max_num_waiting_tokens,
            max_wait_s=max_wait_s,
            metrics_prefix=metrics_prefix,
            api_keys_file=_path(api_keys_file),
            tls=_tls_files(tls_certificate, tls_key, tls_client_ca),
            internal_host=internal_host,
            internal_port=internal_port,
            ray_address=ray_address,
            pin_pools=pin_pools,
            num_threads=num_threads,
            prefill_device=prefill_device.value,
            decode_device=decode_device.value,
            num_gpus_per_worker=num_gpus_per_worker,
            smg_port=smg_port,
            decode_model=decode_model,
            decode_quantization=None if decode_quantization is None else decode_quantization.value,
        )
    except ValidationError as error:
        for problem in error.errors():
            field, text = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
            complain(f"{field}: {text}" if field else text)
        raise typer.Exit(EXIT_USAGE) from error
    signal.signal(signal.SIGTERM, _interrupt)
    with clear_errors():
        _run(wanted)


def _path(path: Path | None) -> str | None:
    """Absolute: the router is another process, workers may be on other hosts."""
    return None if path is None else str(path.expanduser().absolute())


def _tls_files(certificate: Path | None, key: Path | None, ca: Path | None) -> TlsFiles | None:
    """The files of one face, or None without any; pydantic names what is missing."""
    named = {"certificate": _path(certificate), "key": _path(key), "ca": _path(ca)}
    return TlsFiles.model_validate(named) if any(named.values()) else None


def _run(config: ClusterConfig) -> None:
    system: System | None = None
    try:
        with progress() as report:
            system = System.start(config, report=report)
        # Ray sets a handler of its own when it starts.
        signal.signal(signal.SIGTERM, _interrupt)
        out.print(f"serving {config.model.model} on {', '.join(system.addresses)} (Ctrl-C stops)", highlight=False)
        for url in filter(None, (router.http_url for router in system.routers)):
            out.print(f"OpenAI-compatible HTTP on {url}/v1", highlight=False)
        system.wait()
        complain("the supervisor failed; see above")
        raise typer.Exit(EXIT_FAILED)
    except KeyboardInterrupt:
        err.print("stopping", highlight=False)
    finally:
        if system is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            system.stop()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
