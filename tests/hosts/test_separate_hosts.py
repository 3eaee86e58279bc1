"""Workers on hosts of their own, as far as one machine has them: network namespaces joined by veth and a bridge."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from network import OWN_NAMESPACES

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]

TRY = "mount -t tmpfs tmpfs /run && ip netns add one && ip link add switch type bridge && ip netns exec one true"


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    """Skip with the system's own words where namespaces are not permitted, or their tools are missing."""
    try:
        tried = subprocess.run([*OWN_NAMESPACES, "sh", "-c", TRY], capture_output=True, text=True, timeout=20)
    except FileNotFoundError as error:
        pytest.skip(f"namespaces cannot be made here: {error} (util-linux and iproute2 have what is needed)")
    if tried.returncode != 0:
        pytest.skip(f"namespaces cannot be made here: {tried.stderr.strip()}")


@pytest.mark.parametrize("transport", ["grpc", "nixl"])
def test_streams_outlive_a_cable_and_a_host(transport: str) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl_cu12")
    program = Path(__file__).with_name("separate_hosts.py")
    ran = subprocess.run(
        [*OWN_NAMESPACES, sys.executable, str(program), transport], capture_output=True, text=True, timeout=300
    )
    sys.stdout.write(ran.stdout)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
