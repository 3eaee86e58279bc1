"""Laws of the pool planner: it reaches the wanted size, and it touches no worker that may stay."""

from hypothesis import given
from hypothesis import strategies as st

from duopool.cluster.pools import Drain, Place, PlaceState, Start, Stop, index_of, plan, worker_id_of
from duopool.core.types import Role

SIZES = st.fixed_dictionaries({role: st.integers(1, 6) for role in Role})


@st.composite
def pools(draw: st.DrawFn) -> list[Place]:
    return [
        Place(
            worker_id=worker_id_of(role, index),
            role=role,
            state=draw(st.sampled_from(PlaceState)),
            retry_at=draw(st.floats(0, 2)),
            is_idle=draw(st.booleans()),
        )
        for role in Role
        for index in draw(st.sets(st.integers(0, 8)))
    ]


def apply(places: list[Place], actions: list[Start | Drain | Stop]) -> list[Place]:
    """What the places look like when every action has come true and every start has succeeded."""
    by_id = {place.worker_id: place for place in places}
    for action in actions:
        match action:
            case Start(worker_id, role):
                assert worker_id not in by_id or by_id[worker_id].state is PlaceState.WAITING
                by_id[worker_id] = Place(worker_id=worker_id, role=role, state=PlaceState.READY)
            case Drain(worker_id):
                assert by_id[worker_id].state is PlaceState.READY
                by_id[worker_id] = Place(
                    worker_id=worker_id, role=by_id[worker_id].role, state=PlaceState.DRAINING, is_idle=True
                )
            case Stop(worker_id):
                assert by_id[worker_id].state is not PlaceState.READY
                del by_id[worker_id]
    return list(by_id.values())


@given(SIZES, pools())
def test_every_pool_reaches_its_size_and_then_rests(wanted: dict[Role, int], places: list[Place]) -> None:
    for _ in range(4):
        places = apply(places, plan(wanted, places, now=10.0))
        places = [
            Place(worker_id=p.worker_id, role=p.role, state=PlaceState.READY)
            if p.state is PlaceState.STARTING
            else Place(worker_id=p.worker_id, role=p.role, state=p.state, retry_at=p.retry_at, is_idle=True)
            for p in places
        ]
    assert {role: sum(p.role is role for p in places) for role in Role} == wanted
    assert plan(wanted, places, now=10.0) == []


@given(SIZES, pools())
def test_a_worker_that_serves_goes_only_when_all_others_must_go_too(
    wanted: dict[Role, int], places: list[Place]
) -> None:
    actions = plan(wanted, places, now=1.0)
    for role, size in wanted.items():
        ready = [p.worker_id for p in places if p.role is role and p.state is PlaceState.READY]
        drained = [a.worker_id for a in actions if isinstance(a, Drain) and a.worker_id in ready]
        assert len(drained) == max(0, len(ready) - size)
        assert all(index_of(gone) > index_of(kept) for gone in drained for kept in set(ready) - set(drained))


@given(SIZES, pools())
def test_no_place_starts_again_before_its_pause_is_over(wanted: dict[Role, int], places: list[Place]) -> None:
    started = {action.worker_id for action in plan(wanted, places, now=1.0) if isinstance(action, Start)}
    assert not [p for p in places if p.worker_id in started and p.retry_at > 1.0]
