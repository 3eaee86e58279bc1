"""Secrets: where they lie, who may read them, how they are compared, and that none reaches a command line."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from duopool.cluster import admin_access
from duopool.core.config import InternalConfig, RouterConfig
from duopool.core.errors import InvalidRequest, Unauthenticated
from duopool.proto.client_access import ClientAccess
from duopool.proto.internal_access import InternalAccess
from duopool.router.key_file import LOOK_S, KeyFile
from duopool.router.public_access import ANONYMOUS, PublicAccess, Tenant, parse_keys

KEY = "alice-key-0123456789"
OTHER_KEY = "bob-key-0123456789ab"


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUOPOOL_CACHE", str(tmp_path / "duopool"))
    monkeypatch.delenv("DUOPOOL_CREDENTIAL", raising=False)
    return tmp_path / "duopool"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_credential_is_made_once_and_for_its_owner_alone(own_folder: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        prepared = list(threads.map(lambda _: admin_access.prepare(InternalConfig()), range(32)))
    file = own_folder / "credential"
    assert {config.credential_file for config in prepared} == {str(file)}
    assert mode(file) == 0o600
    assert mode(own_folder) == 0o700
    assert os.listdir(own_folder) == ["credential"], "a draft was left"
    credentials = {InternalAccess.load(config, {}).credential for config in prepared}
    assert len(credentials) == 1
    assert len(credentials.pop()) >= 32
    named = own_folder.parent / "elsewhere" / "cluster"
    assert admin_access.prepare(InternalConfig(credential_file=str(named))).credential_file == str(named)
    assert mode(named) == 0o600


def test_a_credential_in_the_environment_comes_first_and_makes_no_file(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUOPOOL_CREDENTIAL", "given by the operator")
    assert admin_access.prepare(InternalConfig()).credential_file is None
    assert not own_folder.exists()
    assert InternalAccess.load(InternalConfig(credential_file="/nowhere")).credential == "given by the operator"


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o666, 0o602])
def test_a_secret_that_others_can_reach_is_refused(tmp_path: Path, bits: int) -> None:
    file = tmp_path / "secret"
    file.write_text(f"alice {KEY}")
    file.chmod(bits)
    with pytest.raises(Unauthenticated, match="chmod 600"):
        InternalAccess.load(InternalConfig(credential_file=str(file)), {})
    with pytest.raises(Unauthenticated, match="chmod 600"):
        PublicAccess.load(RouterConfig(api_keys_file=str(file)), {})
    file.chmod(0o600)
    assert PublicAccess.load(RouterConfig(api_keys_file=str(file)), {}).tenant(f"Bearer {KEY}") == Tenant("alice")


@pytest.mark.parametrize("content", ["", "short", "16 characters, not ascii: é", "two\nlines of a secret"])
def test_a_credential_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "credential"
    file.write_text(content, encoding="utf-8")
    file.chmod(0o600)
    with pytest.raises(Unauthenticated):
        InternalAccess.load(InternalConfig(credential_file=str(file)), {})
    with pytest.raises(Unauthenticated):
        InternalAccess.load(InternalConfig(credential_file=str(tmp_path / "missing")), {})
    with pytest.raises(Unauthenticated, match="DUOPOOL_CREDENTIAL"):
        InternalAccess.load(InternalConfig(), {})


def test_only_the_whole_credential_is_admitted() -> None:
    access = InternalAccess(credential="the cluster's credential")
    assert access.admits({"authorization": "Bearer the cluster's credential"})
    assert access.admits({"authorization": "bearer the cluster's credential"})
    for shown in (
        "",
        "Bearer",
        "Bearer ",
        "the cluster's credential",
        "Basic the cluster's credential",
        "Bearer the cluster's credentia",
        "Bearer the cluster's credential!",
        "Bearer THE CLUSTER'S CREDENTIAL",
        "Bearer é\udc80",
        b"Bearer the cluster's credential",
    ):
        assert not access.admits({"authorization": shown}), shown
    assert not access.admits({})


def test_keys_name_their_tenant() -> None:
    keys = parse_keys(f"# who    with what\nalice {KEY}\nbob {OTHER_KEY} # since May\nalice another-key-of-alice\n\n")
    access = PublicAccess(digests=keys)
    assert access.tenant(f"Bearer {KEY}") == access.tenant("Bearer another-key-of-alice") == Tenant("alice")
    assert access.tenant(f"Bearer {OTHER_KEY}") == Tenant("bob")
    for shown in (None, "", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer alice", f"Bearer {KEY} {OTHER_KEY}"):
        with pytest.raises(Unauthenticated):
            access.tenant(shown)
    assert PublicAccess().tenant(None) == ANONYMOUS
    assert KEY not in repr(access)
    assert KEY not in repr(ClientAccess(api_key=KEY))
    environment = {"DUOPOOL_API_KEYS": f"alice {KEY}, bob {OTHER_KEY}"}
    assert len(PublicAccess.load(RouterConfig(api_keys_file="/nowhere"), environment).digests) == 2


def test_keys_are_given_out_and_taken_back_while_the_router_runs(tmp_path: Path) -> None:
    file, now = tmp_path / "keys", [0.0]
    file.touch(mode=0o600)
    file.write_text(f"alice {KEY}")
    keys = KeyFile(file, parse_keys, clock=lambda: now[0])
    access = PublicAccess(file=keys)

    def opens(key: str) -> bool:
        try:
            return bool(access.tenant(f"Bearer {key}").name)
        except Unauthenticated:
            return False

    assert (opens(KEY), opens(OTHER_KEY)) == (True, False)
    file.write_text(f"alice {KEY}\nbob {OTHER_KEY}")
    now[0] += LOOK_S
    assert (opens(KEY), opens(OTHER_KEY)) == (True, True)
    for wrong in ("", "alice", "# nobody"):  # nobody is locked out, and the door does not stand open either
        file.write_text(wrong)
        now[0] += LOOK_S
        assert (opens(KEY), opens(OTHER_KEY), opens("x" * 20)) == (True, True, False)
    file.chmod(0o644)
    file.write_text("mallory " + "x" * 20)
    now[0] += LOOK_S
    assert not opens("x" * 20)
    file.unlink()
    now[0] += LOOK_S
    assert opens(KEY)
    file.touch(mode=0o600)
    file.write_text(f"bob {OTHER_KEY}")
    now[0] += LOOK_S
    assert (opens(KEY), opens(OTHER_KEY)) == (False, True)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("alice", "api_keys[1]"),
        (f"alice {KEY}\nbob {OTHER_KEY} more", "api_keys[2]"),
        ("alice short", "api_keys[1]"),
        (f"alice {KEY}é", "api_keys[1]"),
        (f"alice {KEY}\nbob {KEY}", "api_keys[2]"),
        (f"{'a' * 200} {KEY}", "api_keys[1]"),
    ],
)
def test_a_wrong_line_is_named_and_never_shown(text: str, place: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_keys(text)
    assert caught.value.field == place
    assert KEY not in str(caught.value)


def test_an_empty_keys_file_opens_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.touch(mode=0o600)
    with pytest.raises(InvalidRequest, match="no key"):
        PublicAccess.load(RouterConfig(api_keys_file=str(file)), {})
    file.write_text("# none yet\n")
    with pytest.raises(InvalidRequest, match="no key"):
        PublicAccess.load(RouterConfig(api_keys_file=str(file)), {})


def test_salts_of_tenants_never_meet() -> None:
    salts = [Tenant(name).salt(salt) for name in ("a", "b", "ab") for salt in (b"", b"a", b"b", b"ab")]
    assert len(set(salts)) == len(salts)
    assert Tenant("a").salt(b"x") == Tenant("a").salt(b"x"), "another router must find the same blocks"
    assert ANONYMOUS.salt(b"x") == b"x"


def test_no_secret_is_in_a_configuration(own_folder: Path) -> None:
    """Configurations travel as arguments of processes, which every user of a machine can read."""
    internal = admin_access.prepare(InternalConfig())
    credential = InternalAccess.load(internal, {}).credential
    assert credential not in RouterConfig(internal=internal).model_dump_json()
    assert credential not in repr(InternalAccess(credential=credential))


def test_commands_find_a_router_by_its_public_address(own_folder: Path) -> None:
    internal = admin_access.prepare(InternalConfig())
    record = admin_access.RouterRecord(internal_address="127.0.0.1:4", internal=internal)
    admin_access.announce(50099, record)
    (file,) = (own_folder / "run").iterdir()
    assert mode(file) == 0o600
    assert admin_access.find("127.0.0.1:50099") == admin_access.find("localhost:50099") == record
    assert admin_access.find("example.org:50099") is None, "another machine's port"
    assert admin_access.find("127.0.0.1:50098") is None
    assert admin_access.find("nonsense") is None
    file.write_text("{")
    assert admin_access.find("127.0.0.1:50099") is None
    admin_access.withdraw(50099)
    admin_access.withdraw(50099)
    assert not file.exists()


def test_the_routers_of_one_system_find_each_other(own_folder: Path) -> None:
    for port, system in ((50091, "one"), (50092, "two"), (50093, "one"), (50094, "")):
        record = admin_access.RouterRecord(internal_address="127.0.0.1:4", internal=InternalConfig(), system=system)
        admin_access.announce(port, record)
    (own_folder / "run" / "another-machine-50095.json").write_text(record.model_dump_json())
    assert admin_access.routers_beside("localhost:50091") == ["127.0.0.1:50093"]
    assert admin_access.routers_beside("127.0.0.1:50092") == []
    assert admin_access.routers_beside("127.0.0.1:50094") == admin_access.routers_beside("example.org:1") == []
