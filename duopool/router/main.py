"""A router process: `python -m duopool.router.main --config JSON` (or `--config @FILE`).

Prints one JSON line with `port`, `http_port` and `internal_port` once it listens, and stops on SIGTERM or SIGINT. In
the configuration, `model.model` is a folder with tokenizer files.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from duopool.core.config import RouterConfig
from duopool.core.errors import DuopoolError
from duopool.router.server import RouterServer
from duopool.router.tokenizer import Tokenizer

YOUNG_OBJECTS = 10_000
"""How many more objects than before the collector lets be before it looks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until a signal comes; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m duopool.router.main", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="RouterConfig as JSON, or @FILE that holds it")
    given = parser.parse_args(arguments).config
    text = Path(given[1:]).read_text(encoding="utf-8") if given.startswith("@") else given
    config = RouterConfig.model_validate_json(text)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # gRPC's own log is noise at its default level, and tokenizers must not start a thread pool of their own.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return asyncio.run(_serve(config))
    except (DuopoolError, OSError) as error:
        print(f"router: {error}", file=sys.stderr)
        return 1


async def _serve(config: RouterConfig) -> int:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    tokenizer = Tokenizer.from_folder(Path(config.model.model))
    tokenizer.warm_up()
    server = RouterServer(config, tokenizer)
    await server.start()
    # What is here lives as long as the process: a full collection that looks at it holds all streams up for 0.1 s.
    gc.collect()
    gc.freeze()
    # A call makes some hundred objects and most of them go with it; to look for cycles every seven calls costs 3 %.
    gc.set_threshold(YOUNG_OBJECTS)
    listening = {"port": server.port, "http_port": server.http_port, "internal_port": server.internal_port}
    print(json.dumps(listening), flush=True)
    try:
        await stopped.wait()
    finally:
        await server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
