"""Starts a private local Ray or joins a running one, and takes back all that it started.

Owns Ray's settings and the temporary folder; knows nothing of workers. A local Ray listens on the loopback address
only, under a token that lives in this process's environment and in no file; its folder is closed to other users.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from duopool.cluster.control_plane import ControlPlane
from duopool.cluster.janitor import Janitor

OBJECT_STORE_BYTES = 80 << 20
"""Nothing large ever goes through Ray's object store; this is close to the least that Ray accepts."""
CONTROL_PLANE_TIMEOUT_S = 600
"""Ray's processes end when their control plane has been away for this long."""
NAMESPACE = "duopool"
LOOPBACK = "127.0.0.1"
_LOG_MONITOR = "log_monitor.py"
_SOCKET_ROOM = 30
"""Ray appends some 75 characters to its folder for unix sockets, whose paths end at 107."""

# Ray and gRPC read these at import or at start.
_LOCAL_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_DEDUP_LOGS": "0",
    # A dead worker's last answer is nobody's business; the supervisor says what happened.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray forks its processes. What gRPC would do in a child crashes there while other threads call, and a signal
    # handler's alarm then ends the started process three seconds later. Here it reaches the gRPC in Ray; grpcio reads
    # it at its import, so a program that has calls under way when it starts a system must set it before that.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RayCluster:
    """A Ray that this process is a driver of."""

    address: str
    is_local: bool
    num_cpus: float
    num_gpus: float
    janitor: Janitor | None
    """Of a local Ray: sees to its folder and its last processes."""
    control_plane: ControlPlane | None
    """Of a local Ray: who keeps it alive."""

    def stop(self) -> None:
        """Leave; a local Ray ends with all its processes and its folder goes. Safe to call twice."""
        import ray

        ray.shutdown()
        if self.control_plane is not None:
            self.control_plane.stop()
        if self.janitor is not None:
            self.janitor.clear_up()


def launch(address: str | None) -> RayCluster:
    """Join the Ray at `address`, or start one on this machine if None."""
    return _start_local() if address is None else _join(address)


def available_cpus() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_local() -> RayCluster:
    os.environ.update(_LOCAL_ENVIRONMENT)
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    root = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="duopool-", dir=root if len(root) <= _SOCKET_ROOM else "/tmp"))
    janitor = Janitor(folder)
    (folder / "gcs").mkdir()
    try:
        # Ray opens its own folder to everyone, so it gets one below ours.
        cluster = _init(
            is_local=True,
            janitor=janitor,
            address="local",
            _temp_dir=str(folder / "ray"),
            _node_ip_address=LOOPBACK,
            object_store_memory=OBJECT_STORE_BYTES,
            num_cpus=available_cpus(),
            include_dashboard=False,
            _system_config={
                # What the control plane knows outlives its process, and everybody waits for its successor.
                "gcs_storage": "rocksdb",
                "gcs_storage_path": str(folder / "gcs"),
                "gcs_rpc_server_reconnect_timeout_s": CONTROL_PLANE_TIMEOUT_S,
                # Ray takes its workers for batch jobs and lets everything else go before them; ours answer people.
                "worker_niceness": 0,
                # A spare process would wake up a hundred times a second, for actors that are hardly ever placed.
                "num_workers_soft_limit": 0,
            },
        )
    except BaseException:
        janitor.clear_up()
        raise
    _end_log_monitor()
    return cluster


def _end_log_monitor() -> None:
    """Ray looks ten times a second for what its workers print, for drivers that listen; this one does not."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(argument.endswith(_LOG_MONITOR) for argument in process.cmdline()):
                process.kill()
                process.wait(timeout=5.0)  # else it stays as a zombie


def _join(address: str) -> RayCluster:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return _init(is_local=False, janitor=None, address=address)


def _init(*, is_local: bool, janitor: Janitor | None, **settings: Any) -> RayCluster:
    import ray

    context = ray.init(
        namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **settings
    )
    resources = ray.cluster_resources()
    return RayCluster(
        address=context.address_info["address"],
        is_local=is_local,
        num_cpus=resources.get("CPU", 0.0),
        num_gpus=resources.get("GPU", 0.0),
        janitor=janitor,
        control_plane=ControlPlane(context.address_info["gcs_address"]) if is_local else None,
    )
