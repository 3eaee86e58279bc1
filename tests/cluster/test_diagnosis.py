"""The doctor sees what is wrong, and never without a mend."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from duopool.cluster import diagnosis
from duopool.cluster.diagnosis import GIB, Finding, Grade, diagnose
from duopool.core.errors import ModelNotFound


def no_model() -> Path:
    raise ModelNotFound("no model here")


OK, NOTE, BROKEN = Grade.OK, Grade.NOTE, Grade.BROKEN
CASES: list[tuple[Grade, str, Callable[[], Finding]]] = [
    (OK, "3.12.1", lambda: diagnosis.check_python((3, 12, 1))),
    (BROKEN, "3.10.2", lambda: diagnosis.check_python((3, 10, 2))),
    (OK, "AVX2", lambda: diagnosis.check_kernels("AVX2")),
    (NOTE, "slower", lambda: diagnosis.check_kernels(None)),
    (OK, "any", lambda: diagnosis.check_port("port", 0, is_free=lambda port: False)),
    (BROKEN, "50051", lambda: diagnosis.check_port("port", 50051, is_free=lambda port: False)),
    (OK, "nixl", lambda: diagnosis.check_transport("auto", ("nixl", "grpc"))),
    (NOTE, "grpc", lambda: diagnosis.check_transport("auto", ("grpc",))),
    (BROKEN, "nixl was asked for", lambda: diagnosis.check_transport("nixl", ("grpc",))),
    (OK, "private", lambda: diagnosis.check_ray(None, {})),
    (NOTE, "1.2.3.4:6379", lambda: diagnosis.check_ray(None, {"RAY_ADDRESS": "1.2.3.4:6379"})),
    (NOTE, "without a token", lambda: diagnosis.check_ray("auto", {})),
    (OK, "with a token", lambda: diagnosis.check_ray("auto", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"})),
    (OK, "16.0 of 24.0", lambda: diagnosis.check_memory(24 * GIB, 16 * GIB, num_cores=2)),
    (BROKEN, "1.0 of 24.0", lambda: diagnosis.check_memory(24 * GIB, GIB, num_cores=2)),
    (BROKEN, "0.1", lambda: diagnosis.check_shared_memory(64 << 20)),
    (NOTE, "not there", lambda: diagnosis.check_shared_memory(None)),
    (NOTE, "1024", lambda: diagnosis.check_open_files(1024)),
    (OK, "65536", lambda: diagnosis.check_open_files(65536)),
    (BROKEN, "1970", lambda: diagnosis.check_clock(1970, 1e-9)),
    (NOTE, "10.0 ms", lambda: diagnosis.check_clock(2026, 0.01)),
    (OK, "model.gguf", lambda: diagnosis.check_model(lambda: Path("/models/model.gguf"))),
    (NOTE, "no model here", lambda: diagnosis.check_model(no_model)),
]


@pytest.mark.parametrize(("grade", "told", "look"), CASES)
def test_a_fact_gets_its_grade_and_a_mend_if_it_needs_one(grade: Grade, told: str, look: Callable[[], Finding]) -> None:
    finding = look()
    assert finding.grade is grade
    assert told in finding.detail
    assert bool(finding.mend) is (grade is not OK)


def test_missing_and_old_packages_are_named_one_by_one() -> None:
    versions = {"grpcio": "1.2", "pydantic": "2.11"}
    wanted = ["grpcio>=1.80", "pydantic>=2.10", "absent>=1", "only-windows; platform_system == 'Windows'"]
    findings = diagnosis.check_packages(wanted, versions.get)
    assert [finding.mend for finding in findings] == ["pip install 'grpcio>=1.80'", "pip install 'absent>=1'"]
    assert diagnosis.check_packages(["pydantic>=2.10"], versions.get)[0].grade is OK


def test_a_taken_port_is_seen_on_the_real_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        findings = diagnose(ports={"port": port}, transport="grpc", ray_address=None)
    assert [finding.grade for finding in findings if finding.what == "port"] == [BROKEN]
