"""A head, a prefill and two decode hosts; under streams one loses its cable and another its power: `make hosts`.

Runs inside `network.OWN_NAMESPACES`. Prints what it sees; an AssertionError says what is wrong.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / folder) for folder in ("tests/e2e", "benchmarks", ".")]

from calls import Load, complete, greedy_request, has_workers, state, wait_for  # noqa: E402
from network import Host, Network  # noqa: E402
from tiny_model import make_tiny_model  # noqa: E402

BIN = Path(sys.executable).parent
RAY_PORT, PORT, INTERNAL_PORT = 6379, 50051, 50052
EVERYONE = {"prefill-0", "decode-0", "decode-1"}
NUM_TOKENS = 32


def main(transport: str) -> None:
    with tempfile.TemporaryDirectory(prefix="duopool-hosts-") as place, Network(Path(place)) as network:
        try:
            visit(network, str(make_tiny_model(Path(place) / "model")), Path(place), transport=transport)
        except BaseException:
            for log in sorted(Path(place).glob("*.log")):
                print(f"---- {log.stem}\n{log.read_text(errors='replace')[-3000:]}", flush=True)
            raise


def visit(network: Network, model: str, folder: Path, *, transport: str) -> None:
    token = secrets.token_hex(32)
    os.environ["DUOPOOL_CREDENTIAL"] = token  # this process is the operator and the client
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "PYTHONPATH": os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part),
        "UCX_TLS": "tcp",  # these hosts do share memory, and NIXL would find out; over TCP it refuses, and gRPC serves
    }
    ray = f"{BIN}/ray start --node-ip-address=ADDRESS --object-store-memory=80000000 --disable-usage-stats"
    start_head = f"{ray} --head --port={RAY_PORT} --num-cpus=0 --include-dashboard=false --temp-dir=$RAY_FOLDER"
    serve = (
        f"{BIN}/python -m duopool.cluster serve --ray-address ADDRESS:{RAY_PORT} --pin-pools --decode 2 --no-http"
        f" --host ADDRESS --port {PORT} --internal-host ADDRESS --internal-port {INTERNAL_PORT}"
        f" --model {model} --num-blocks 256 --num-threads 1 --transport {transport}"
    )
    head = network.host("head", ("sh", "-c", f"{start_head} && exec {serve}"), environment)

    def member(name: str, pool: str) -> Host:
        join = f"exec {ray} --address={head.address}:{RAY_PORT} --num-cpus=1 --resources='{{\"{pool}\": 1}}' --block"
        return network.host(name, ("sh", "-c", join), environment)

    wait_until(lambda: "Ray runtime started" in (folder / "head.log").read_text(), head)
    hosts = {"prefill": member("prefill", "prefill"), "d1": member("d1", "decode"), "d2": member("d2", "decode")}
    address, operator = f"{head.address}:{PORT}", f"{head.address}:{INTERNAL_PORT}"
    wait_until(lambda: "serving" in (folder / "head.log").read_text(), head)
    told = wait_for(operator, has_workers(EVERYONE))
    print(f"up: {', '.join(sorted(f'{worker.worker_id} on {worker.address}' for worker in told.workers))}")
    assert len({worker.address.rpartition(":")[0] for worker in told.workers}) == 3

    prompts = [tuple(range(300 * at, 300 * at + 150)) for at in range(8)]
    received = {name: host.bytes_received for name, host in hosts.items()}
    records = complete(address, [greedy_request(prompt, max_tokens=NUM_TOKENS) for prompt in prompts])
    pulled = sum(record.finished.times.transfer_bytes for record in records if record.finished is not None)
    over_cable = sum(hosts[name].bytes_received - received[name] for name in ("d1", "d2"))
    print(f"pulled {pulled:,} bytes of KV with {transport}, {over_cable:,} came in over the decode hosts' cables")
    assert 0 < pulled < over_cable
    expected = [tuple(record.token_ids) for record in records]

    where = {worker.address.rpartition(":")[0]: worker.worker_id for worker in told.workers}
    for name, event, successor in (("d1", Host.unplug, "d3"), ("d2", Host.die, "d4")):
        lost = where[hosts[name].address]
        with Load(address, prompts, expected) as load:
            load.wait_until_served_by({lost})
            event(hosts[name])
            began_at = time.monotonic()
            left = wait_for(operator, lambda now, lost=lost: lost not in {worker.worker_id for worker in now.workers})
            noticed_s = time.monotonic() - began_at
            assert {worker.worker_id for worker in left.workers} < EVERYONE
            hosts[successor] = member(successor, "decode")
            joined_at = time.monotonic()
            told = wait_for(operator, has_workers(EVERYONE))
            back_s = time.monotonic() - joined_at
        assert load.wrong == [], load.wrong
        with Load(address, prompts, expected) as load:
            load.wait_until_served_by({lost})
        assert load.wrong == [], load.wrong
        where = {worker.address.rpartition(":")[0]: worker.worker_id for worker in told.workers}
        assert where[hosts[successor].address] == lost
        print(
            f"{event.__name__} {name} ({lost}): gone from the membership after {noticed_s:.1f} s, on {successor} "
            f"{back_s:.1f} s after that was switched on; 0 lost, 0 changed"
        )
    assert state(operator).requests == 0


def wait_until(is_so: Callable[[], bool], head: Host) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert head.is_up, "the head has ended"
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1])
