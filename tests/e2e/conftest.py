"""One reference of the real model per test run, and a fence around every system: nothing may outlive it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from calls import wait_for_rest
from reference import Reference
from remains import Remains, is_open
from tiny_model import make_tiny_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray reads these once per process: every cluster of this run, whoever starts it, must ask for the same token.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@pytest.fixture(scope="session")
def reference() -> Reference:
    """SmolLM2 in float32, run by transformers itself."""
    return Reference()


@pytest.fixture(scope="module", autouse=True)
def _credential_from_its_file() -> Iterator[None]:
    """Systems make and find their credential's file, as a user's do; the other tests of the run keep theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DUOPOOL_CREDENTIAL", raising=False)
        yield


@pytest.fixture(scope="module")
def nothing_remains() -> Iterator[Remains]:
    """Compare processes and folders before and after a module's systems."""
    remains = Remains()
    yield remains
    remains.check()


@pytest.fixture(autouse=True)
def _audited(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test, whatever system still runs has nothing lost, doubled or held."""
    yield
    if "nothing_remains" in request.fixturenames:
        for address in filter(is_open, request.getfixturevalue("nothing_remains").addresses):
            wait_for_rest(address)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that loads in a moment."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))
