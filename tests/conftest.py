"""Hypothesis for the whole suite: the same examples every time, so that a red run is red for everyone.

`HYPOTHESIS_PROFILE=search pytest tests/...` looks at new examples with every run.
"""

from __future__ import annotations

import os

from hypothesis import settings

# Routers and workers inside test processes need a credential; whole systems make their own file, see e2e/conftest.py.
os.environ.setdefault("DUOPOOL_CREDENTIAL", "a credential for tests")

# gRPC reads it at its import; `duopool/cluster/launch.py` says why, tests/e2e/test_forks.py holds it.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

settings.register_profile("everyday", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "everyday"))
