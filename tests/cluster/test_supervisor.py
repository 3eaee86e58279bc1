"""The supervisor with fake processes and a clock of our own."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from supervisor_fakes import FakeSpawner

from duopool.cluster.config import SupervisorConfig
from duopool.cluster.membership import SAME_FIELDS, ClusterView
from duopool.cluster.supervisor import Supervisor
from duopool.core.errors import InvalidRequest, WorkerNotFound
from duopool.core.types import Role

CONFIG = SupervisorConfig(
    tick_s=0.1, ping_s=0.5, ping_timeout_s=5, start_timeout_s=60, drain_timeout_s=30, backoff_s=1, max_backoff_s=8
)


class Stage:
    """A supervisor, its processes and its clock."""

    def __init__(self, *, prefill: int = 1, decode: int = 1) -> None:
        self.now = 100.0
        self.spawner = FakeSpawner()
        self.published: list[ClusterView] = []
        self.supervisor = Supervisor(
            config=CONFIG,
            spawn=self.spawner,
            publish=self.published.append,
            wanted={Role.PREFILL: prefill, Role.DECODE: decode},
        )

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / CONFIG.tick_s)):
            self.supervisor.tick(self.now)
            self.now += CONFIG.tick_s

    def start_all(self) -> None:
        self.run(0.2)
        for process in self.spawner.processes:
            process.is_started = True
        self.run(0.2)

    @property
    def members(self) -> dict[str, bool]:
        """Worker id -> draining, as routers know it."""
        return {info.worker_id: info.draining for info in self.published[-1].members}


def test_routers_learn_of_workers_only_when_they_are_ready() -> None:
    stage = Stage(prefill=2)
    stage.run(1)
    assert stage.members == {}
    stage.start_all()
    assert stage.members == {"prefill-0": False, "prefill-1": False, "decode-0": False}
    assert stage.supervisor.is_complete


def test_a_dead_worker_leaves_at_once_and_comes_back_as_another_incarnation() -> None:
    stage = Stage()
    stage.start_all()
    first = stage.spawner.newest("decode-0")
    first.is_dead = True
    stage.run(0.3)
    assert "decode-0" not in stage.members
    stage.run(2)
    second = stage.spawner.newest("decode-0")
    assert second is not first
    second.is_started = True
    stage.run(0.3)
    (info,) = [info for info in stage.published[-1].members if info.worker_id == "decode-0"]
    assert info.incarnation == second.info.incarnation != first.info.incarnation


def test_a_worker_that_answers_nothing_is_killed_and_replaced() -> None:
    stage = Stage()
    stage.start_all()
    hanging = stage.spawner.newest("prefill-0")
    hanging.is_silent = True
    stage.run(CONFIG.ping_timeout_s + 1)
    assert hanging.was_killed
    assert "prefill-0" not in stage.members
    stage.run(2)
    assert stage.spawner.newest("prefill-0") is not hanging


def test_the_pause_before_a_replacement_doubles_up_to_its_limit() -> None:
    stage = Stage()
    births: list[float] = []
    for _ in range(600):
        before = len(stage.spawner.processes)
        stage.run(CONFIG.tick_s)
        for process in stage.spawner.processes[before:]:
            if process.info.worker_id == "decode-0":
                births.append(stage.now)
                process.is_dead = True
    pauses = [later - earlier for earlier, later in pairwise(births)]
    for pause, expected in zip(pauses, [1, 2, 4, 8, 8, 8], strict=False):
        assert expected <= pause <= expected + 0.5
    assert len(pauses) >= 5


@pytest.mark.parametrize("drain_first", [False, True])
@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (2, 3)])
def test_a_rolling_restart_renews_every_worker_and_keeps_the_pools_serving(
    prefill: int, decode: int, drain_first: bool
) -> None:
    stage = Stage(prefill=prefill, decode=decode)
    stage.start_all()
    old = list(stage.spawner.processes)
    sizes = {"prefill": prefill, "decode": decode}
    stage.supervisor.restart(drain_first=drain_first)
    for _ in range(60 * len(old)):
        stage.run(0.1)
        for role, size in sizes.items():
            serving = [name for name, draining in stage.members.items() if name.startswith(role) and not draining]
            assert size - drain_first <= len(serving) <= size + 1
        assert sum(stage.members.values()) <= 1, "two workers drain at once"
        for process in stage.spawner.alive:
            process.is_started = True
            process.is_idle = process.is_draining
        if all(process.was_killed for process in old) and stage.supervisor.is_complete:
            break
    assert all(process.was_killed for process in old)
    stage.run(2)
    assert len(stage.spawner.alive) == len(old)
    assert sorted(name.rpartition("-")[0] for name in stage.members) == ["decode"] * decode + ["prefill"] * prefill


def test_a_worker_that_dies_in_a_rolling_restart_is_replaced_once() -> None:
    stage = Stage(decode=2)
    stage.start_all()
    stage.supervisor.restart()
    stage.spawner.newest("decode-0").is_dead = True
    for _ in range(200):
        stage.run(0.1)
        for process in stage.spawner.alive:
            process.is_started = True
            process.is_idle = True
    assert stage.supervisor.is_complete
    assert len(stage.spawner.alive) == 3
    assert len(stage.spawner.processes) == 6


@pytest.mark.parametrize("field", SAME_FIELDS)
def test_a_worker_with_other_blocks_is_refused_by_the_field_that_differs(field: str) -> None:
    stage = Stage()
    stage.start_all()
    stage.spawner.changes = {field: 32 if field in ("block_size", "vocab_size") else "other"}
    stage.supervisor.scale({"decode": 2})
    stage.run(0.3)
    stranger = stage.spawner.newest("decode-1")
    stranger.is_started = True
    stage.run(0.3)
    assert stranger.was_killed
    assert "decode-1" not in stage.members
    assert f"decode-1: {field} is " in stage.supervisor.last_error


def test_scaling_down_drains_first_and_stops_when_idle() -> None:
    stage = Stage(decode=2)
    stage.start_all()
    leaving = stage.spawner.newest("decode-1")
    leaving.is_idle = False
    stage.supervisor.scale({"decode": 1})
    stage.run(5)
    assert stage.members["decode-1"] is True
    assert leaving.is_draining
    assert not leaving.was_killed
    leaving.is_idle = True
    stage.run(3)
    assert leaving.was_killed
    assert set(stage.members) == {"prefill-0", "decode-0"}


def test_draining_ends_after_its_limit() -> None:
    stage = Stage(decode=2)
    stage.start_all()
    leaving = stage.spawner.newest("decode-1")
    leaving.is_idle = False
    stage.supervisor.scale({"decode": 1})
    stage.run(CONFIG.drain_timeout_s + 1)
    assert leaving.was_killed


def test_a_drained_worker_is_replaced_in_another_place() -> None:
    stage = Stage()
    stage.start_all()
    stage.supervisor.drain("decode-0", life_of(stage, "decode-0"), stage.now)
    stage.run(0.3)
    assert stage.members["decode-0"] is True
    stage.spawner.newest("decode-1").is_started = True
    stage.run(3)
    assert stage.members == {"prefill-0": False, "decode-1": False}


@pytest.mark.parametrize("sizes", [{"decode": 0}, {"decode": 257}, {"router": 1}, {"decode": 2, "prefill": 0}])
def test_a_bad_size_changes_nothing(sizes: dict[str, int]) -> None:
    stage = Stage()
    with pytest.raises(InvalidRequest):
        stage.supervisor.scale(sizes)
    assert stage.supervisor.wanted == {Role.PREFILL: 1, Role.DECODE: 1}


def test_only_a_live_worker_can_be_drained() -> None:
    stage = Stage()
    stage.run(0.2)
    for worker_id in ("decode-0", "decode-7", "nonsense"):
        with pytest.raises(WorkerNotFound):
            stage.supervisor.drain(worker_id, 0, stage.now)


def test_a_drain_that_was_meant_for_a_worker_that_died_leaves_its_successor_alone() -> None:
    stage = Stage()
    stage.start_all()
    meant = life_of(stage, "decode-0")
    stage.spawner.newest("decode-0").is_dead = True
    stage.run(0.3)
    stage.run(CONFIG.max_backoff_s)
    stage.start_all()
    assert life_of(stage, "decode-0") != meant
    with pytest.raises(WorkerNotFound, match="replaced"):
        stage.supervisor.drain("decode-0", meant, stage.now)
    assert stage.members == {"prefill-0": False, "decode-0": False}


def life_of(stage: Stage, worker_id: str) -> int:
    return next(info.incarnation for info in stage.supervisor.view.members if info.worker_id == worker_id)


class AnyLife(RuleBasedStateMachine):
    """Whatever happens, when it ends the pools come back to their wanted sizes and no process is forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage(prefill=2, decode=2)

    @rule(seconds=st.sampled_from([0.1, 0.5, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.stage.run(seconds)

    @rule(pick=st.integers(0, 30), what=st.sampled_from(["is_started", "is_dead", "is_silent"]))
    def something_happens_to_a_process(self, pick: int, what: str) -> None:
        if alive := self.stage.spawner.alive:
            setattr(alive[pick % len(alive)], what, True)

    @rule(pick=st.integers(0, 30), is_idle=st.booleans())
    def load_changes(self, pick: int, is_idle: bool) -> None:
        if alive := self.stage.spawner.alive:
            alive[pick % len(alive)].is_idle = is_idle

    @rule(pool=st.sampled_from(["prefill", "decode"]), size=st.integers(1, 4))
    def scale(self, pool: str, size: int) -> None:
        self.stage.supervisor.scale({pool: size})

    @rule(pick=st.integers(0, 30))
    def drain(self, pick: int) -> None:
        members = self.stage.supervisor.view.members
        if members:
            member = members[pick % len(members)]
            self.stage.supervisor.drain(member.worker_id, member.incarnation, self.stage.now)

    @invariant()
    def members_are_started_and_unique(self) -> None:
        ids = [info.worker_id for info in self.stage.supervisor.view.members]
        assert len(ids) == len(set(ids))
        assert all(self.stage.spawner.newest(worker_id).is_started for worker_id in ids)

    def teardown(self) -> None:
        for _ in range(60):
            for process in self.stage.spawner.alive:
                process.is_started, process.is_silent, process.is_idle = True, False, True
            self.stage.run(1)
        wanted = self.stage.supervisor.wanted
        assert {role: self.stage.supervisor.num_ready(role) for role in Role} == wanted
        assert len(self.stage.spawner.alive) == sum(wanted.values())
        self.stage.supervisor.stop_all()
        assert self.stage.spawner.alive == []
        assert self.stage.members == {}


TestAnyLife = AnyLife.TestCase
TestAnyLife.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_a_host_whose_worker_died_starts_the_next_one_and_a_dead_host_is_replaced() -> None:
    stage = Stage()
    stage.start_all()
    host = stage.spawner.newest("decode-0")
    first = host.info.incarnation
    host.is_dead = host.has_host = True
    stage.run(CONFIG.backoff_s + 0.3)
    assert not host.was_killed
    assert host.num_starts == 2
    assert stage.members == {"prefill-0": False}
    host.is_started = True
    stage.run(0.2)
    assert stage.members == {"prefill-0": False, "decode-0": False}
    assert {info.incarnation for info in stage.published[-1].members if info.role == "decode"} != {first}

    host.is_dead = host.has_host = True
    stage.run(2 * CONFIG.backoff_s + 0.3)
    host.is_dead = True  # the host itself, while its next worker starts
    stage.run(4 * CONFIG.backoff_s + 0.3)
    assert host.was_killed
    assert stage.spawner.newest("decode-0") is not host
