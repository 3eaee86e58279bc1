"""Finds NIXL, quietly: which package carries it here, and the settings it reads from the environment on import.

NIXL is https://github.com/ai-dynamo/nixl, as `nixl-cu12` or `nixl-cu13`; both move CPU memory too.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

_PACKAGES = ("nixl_cu12", "nixl_cu13")
_SETTINGS = {
    # An emulated read needs P's part in it, and UCX ends P's process if D goes away meanwhile ("Endpoint timeout" in
    # ucp_request.inl). Without emulation such a read is refused at once, and its pages go over gRPC.
    "UCX_PROTO_EMULATION_ENABLE": "n",
    "NIXL_LOG_LEVEL": "FATAL",
    "UCX_LOG_LEVEL": "fatal",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}


def can_load() -> bool:
    """True if `load` will work."""
    if all(importlib.util.find_spec(package) is None for package in _PACKAGES):
        return False
    try:
        load()
    except ImportError:
        return False
    return True


def load() -> Any:
    """NIXL's Python module. Raises ImportError if none can be loaded. What the user set stays set."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    problems = []
    for package in _PACKAGES:
        try:
            return importlib.import_module(f"{package}._api")
        except ImportError as problem:
            problems.append(str(problem))
    raise ImportError(f"no NIXL here: {'; '.join(problems)}")
