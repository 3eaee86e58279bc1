"""Hosts on one machine: each has a network, processes and shared memory of its own, and a cable to a common switch.

Everything lies inside the namespaces of the process that uses this (`test_separate_hosts.py` makes them): the machine's
own network is not touched, and nothing outlives that process.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

OWN_NAMESPACES = ("unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child")
"""In front of a command: whoever may make a user namespace may do all that is done here, as root or not."""
SWITCH = "switch"
SUBNET = "10.77.0"
_START = 'hostname "$0" && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs "$RAY_FOLDER" && exec "$@"'


class Network:
    """The switch, where the process itself is plugged in too. Hosts are cut off, die and end with it."""

    def __init__(self, folder: Path) -> None:
        """`folder` takes the hosts' logs; its `ray` is empty and another place on each of them."""
        self._folder = folder
        (folder / "ray").mkdir()
        self._hosts: list[Host] = []
        _run("mount", "-t", "tmpfs", "tmpfs", "/run")  # where `ip netns` keeps its names
        _run("ip", "link", "set", "lo", "up")
        _run("ip", "link", "add", SWITCH, "type", "bridge")
        _run("ip", "address", "add", f"{SUBNET}.1/24", "dev", SWITCH)
        _run("ip", "link", "set", SWITCH, "up")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self._hosts:
            host.die()

    def host(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Host:
        """A new host, switched on: it runs this command and lives as long as it does."""
        address = f"{SUBNET}.{10 + len(self._hosts)}"
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "link", "set", name, "master", SWITCH, "up")
        _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", name, "link", "set", device, "up")
        inside = ("ip", "netns", "exec", name)
        own = ("unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        started = [*inside, *own, "sh", "-c", _START, name, *(part.replace("ADDRESS", address) for part in command)]
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                started,
                env={**environment, "RAY_FOLDER": str(self._folder / "ray")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        host = Host(name, address, process)
        self._hosts.append(host)
        return host


class Host:
    """One host that runs."""

    def __init__(self, name: str, address: str, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.address = address
        self._process = process

    @property
    def is_up(self) -> bool:
        return self._process.poll() is None

    @property
    def bytes_received(self) -> int:
        """Over its cable, ever."""
        (link,) = json.loads(_run("ip", "-json", "-statistics", "link", "show", self.name))
        return int(link["stats64"]["tx"]["bytes"])  # what the switch's end has sent

    def unplug(self) -> None:
        """Nothing comes in or goes out any more, and nobody is told."""
        _run("ip", "link", "set", self.name, "down")

    def die(self) -> None:
        """Power off: all its processes at once. Safe to call twice."""
        self._process.kill()
        self._process.wait()


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
