"""A serving system for a benchmark: the running one it was pointed at, or one that lives as long as the benchmark."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny_model import make_tiny_model

from duopool.cluster.config import ClusterConfig
from duopool.cluster.system import System
from duopool.core.config import CacheConfig, HandoffConfig, ModelConfig, SchedulerConfig


def add_options(parser: argparse.ArgumentParser, *, model: str, prefill: int = 1, decode: int = 1) -> None:
    """What `own_system` reads; the arguments are the defaults."""
    parser.add_argument("--address", help="HOST:PORT of a running system on this machine")
    parser.add_argument("--model", default=model, help="'tiny' is a random model of two layers")
    parser.add_argument("--prefill", type=int, default=prefill)
    parser.add_argument("--decode", type=int, default=decode)
    parser.add_argument("--num-blocks", type=int, default=1024)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--transport", default="auto", choices=("auto", "nixl", "grpc"))


@contextmanager
def own_system(arguments: argparse.Namespace, *, max_model_len: int = 512) -> Iterator[str]:
    """host:port of its router. `max_model_len` is the tiny model's."""
    if arguments.address is not None:
        yield arguments.address
        return
    with tempfile.TemporaryDirectory() as folder:
        is_tiny = arguments.model == "tiny"
        model = str(make_tiny_model(Path(folder), max_model_len=max_model_len)) if is_tiny else arguments.model
        config = ClusterConfig(
            port=0,
            prefill=arguments.prefill,
            decode=arguments.decode,
            model=ModelConfig(model=model, served_model_name=arguments.model),
            cache=CacheConfig(num_blocks=arguments.num_blocks),
            scheduler=SchedulerConfig(max_num_seqs=arguments.max_num_seqs),
            handoff=HandoffConfig(transport=arguments.transport),
            num_threads=1,
        )
        with System.start(config) as system:
            yield system.address
