"""The books: enumeration of small cases, and random histories held against a model of what must be true."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isgd_jax.engines.chunks import Chunks
from isgd_jax.engines.desk import Desk, Order

PATIENCE = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(num_chunks: int = 4, **options: Any) -> tuple[Desk, Clock]:
    clock = Clock()
    desk = Desk(Chunks(2 * num_chunks - 1, 2), patience=PATIENCE, now=clock, **options)
    desk.announce(0)
    return desk, clock


def scores(desk: Desk, order: Order, num_chunks: int = 4) -> np.ndarray:
    """What a worker finds: the chunk and the version, so that a mix-up shows. The last chunk is one short."""
    size = 1 if order.chunk == num_chunks - 1 else 2
    return np.full(size, 100.0 * order.version + order.chunk, np.float32)


def handed(desk: Desk, count: int, *, version: int = 0, worker: str = "a") -> list[Order]:
    orders = [desk.next_order(worker, version) for _ in range(count)]
    return [order for order in orders if order is not None]


def test_a_sweep_goes_round_and_rests_when_all_is_scored() -> None:
    desk, _ = make()
    assert [order.chunk for order in handed(desk, 6)] == [0, 1, 2, 3]
    desk.announce(1)
    assert [order.chunk for order in handed(desk, 6, version=1)] == [0, 1, 2, 3]


def test_a_newer_version_goes_on_where_the_sweep_stands() -> None:
    desk, _ = make()
    assert [order.chunk for order in handed(desk, 3)] == [0, 1, 2]
    desk.announce(1)
    assert [order.chunk for order in handed(desk, 9, version=1)] == [3, 0, 1, 2]


def test_results_come_back_once_in_the_order_of_arrival() -> None:
    desk, _ = make()
    orders = handed(desk, 4)
    for order in (orders[2], orders[0], orders[3]):
        assert desk.take(order, scores(desk, order)) is None
    assert [(int(c.ids[0]), c.version, c.scores.tolist()) for c in desk.collect()] == [
        (4, 0, [2.0, 2.0]), (0, 0, [0.0, 0.0]), (6, 0, [3.0]),
    ]  # fmt: skip
    assert desk.collect() == []
    assert desk.missing(0) == 1
    assert not desk.is_complete(0)
    desk.take(orders[1], scores(desk, orders[1]))
    assert desk.is_complete(0)


def test_a_result_twice_or_of_an_older_version_changes_nothing() -> None:
    desk, _ = make()
    (old,) = handed(desk, 1)
    desk.announce(1)
    new = next(order for order in handed(desk, 4, version=1, worker="b") if order.chunk == old.chunk)
    for order in (new, new, old, old):
        assert desk.take(order, scores(desk, order)) is None
    assert [(chunk.version, chunk.scores[0]) for chunk in desk.collect()] == [(1, 100.0)]
    assert (desk.counts.taken, desk.counts.repeated) == (1, 3)


def test_only_the_newest_result_of_a_chunk_waits_for_the_trainer() -> None:
    desk, _ = make()
    for version in range(5):
        desk.announce(version)
        for order in handed(desk, 4, version=version):
            desk.take(order, scores(desk, order))
    assert [chunk.version for chunk in desk.collect()] == [4, 4, 4, 4]


def test_an_order_not_back_in_time_is_handed_out_again_and_first() -> None:
    desk, clock = make()
    late = handed(desk, 2, worker="slow")
    clock.now = PATIENCE
    again = handed(desk, 4, worker="quick")
    assert [order.chunk for order in again] == [0, 1, 2, 3]
    assert desk.counts.again == 2
    desk.take(again[0], scores(desk, again[0]))
    desk.take(late[0], scores(desk, late[0]))
    desk.take(late[1], scores(desk, late[1]))  # late, but the first: it is used, and the copy changes nothing
    desk.take(again[1], scores(desk, again[1]))
    assert [int(chunk.ids[0]) for chunk in desk.collect()] == [0, 2]
    assert desk.counts.repeated == 2


def test_orders_of_a_worker_that_left_are_handed_out_again() -> None:
    desk, _ = make()
    handed(desk, 2, worker="gone")
    handed(desk, 1, worker="here")
    desk.give_back("gone")
    assert [order.chunk for order in handed(desk, 4, worker="here")] == [0, 1, 3]


def test_a_worker_that_holds_old_parameters_says_so_with_its_scores() -> None:
    desk, _ = make()
    desk.announce(5)
    order = desk.next_order("a", 3)
    assert order is not None
    desk.take(order, scores(desk, order))
    assert [chunk.version for chunk in desk.collect()] == [3]


def test_the_cursor_is_kept_and_set() -> None:
    desk, _ = make()
    handed(desk, 3)
    assert desk.cursor == 3
    other, _ = make()
    other.cursor = 3
    assert [order.chunk for order in handed(other, 2)] == [3, 0]


@pytest.mark.parametrize(
    ("order", "found", "fingerprint", "wrong"),
    [
        (
            Order(0, 0),
            np.zeros(3, np.float32),
            "ours",
            r"expected \[2\] floating-point scores, got float32\[3\]",
        ),
        (Order(3, 0), np.zeros(2, np.float32), "ours", r"expected \[1\]"),
        (Order(0, 0), np.zeros(2, np.int32), "ours", r"got int32\[2\]"),
        (Order(4, 0), np.zeros(2, np.float32), "ours", "there is no chunk 4"),
        (Order(-1, 0), np.zeros(2, np.float32), "ours", "there is no chunk -1"),
        (Order(0, 1), np.zeros(2, np.float32), "ours", "no parameters of version 1 were published"),
        (Order(0, -1), np.zeros(2, np.float32), "ours", "no parameters of version -1"),
        (Order(0, 0), np.zeros(2, np.float32), "theirs", "another data set: expected .*'ours', got 'theirs'"),
    ],
)
def test_what_cannot_be_right_is_refused(order: Order, found: np.ndarray, fingerprint: str, wrong: str) -> None:
    desk, _ = make(fingerprint="ours")
    said = desk.take(order, found, fingerprint=fingerprint)
    assert said is not None
    with pytest.raises(AssertionError, match=wrong):
        raise AssertionError(said)
    assert desk.collect() == []
    assert desk.counts.refused == 1


def test_a_worker_with_other_data_is_told_so() -> None:
    desk, _ = make(fingerprint="ours")
    desk.check("ours")
    with pytest.raises(
        ValueError, match="another data set: expected fingerprint 'ours', got 'theirs'; give it the same"
    ):
        desk.check("theirs")


def test_scores_that_are_not_finite_are_for_the_table_to_judge() -> None:
    desk, _ = make()
    (order,) = handed(desk, 1)
    assert desk.take(order, np.full(2, np.nan, np.float32)) is None
    assert len(desk.collect()) == 1


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["ask", "bring", "twice", "die", "wait", "publish", "collect"]), st.integers(0, 7)),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(actions=ACTIONS, num_chunks=st.integers(1, 5))
def test_any_history_keeps_the_guarantees(actions: list[tuple[str, int]], num_chunks: int) -> None:
    """Workers that ask, bring, bring twice, die and dawdle in any order; then they behave, and all gets scored."""
    desk, clock = make(num_chunks)
    version, out, kept = 0, [], dict.fromkeys(range(num_chunks), -1)
    for action, which in actions:
        worker = str(which % 3)
        if action == "ask":
            held = max(0, version - which % 2)  # some hold older parameters
            order = desk.next_order(worker, held)
            if order is not None:
                assert order.version == held
                assert held > kept[order.chunk], "scored at this version already"
                live = [o for w, o, due in out if o.chunk == order.chunk and due > clock.now and w != "dead"]
                assert all(o.version < held for o in live), "out with somebody at this version already"
                out.append((worker, order, clock.now + PATIENCE))
        elif action in ("bring", "twice") and out:
            _, order, _ = out[which % len(out)]
            assert desk.take(order, scores(desk, order, num_chunks)) is None
            kept[order.chunk] = max(kept[order.chunk], order.version)
            if action == "bring":
                out.pop(which % len(out))
        elif action == "die":
            desk.give_back(worker)
            out = [("dead" if w == worker else w, order, due) for w, order, due in out]
        elif action == "wait":
            clock.now += which
        elif action == "publish":
            version += 1
            desk.announce(version)
        elif action == "collect":
            for chunk in desk.collect():
                assert chunk.scores[0] == 100.0 * chunk.version + chunk.ids[0] // 2
                assert chunk.version == kept[int(chunk.ids[0]) // 2]
    clock.now += PATIENCE
    version += 1
    desk.announce(version)
    seen = []
    while (order := desk.next_order("good", version)) is not None:
        seen.append(order.chunk)
        desk.take(order, scores(desk, order, num_chunks))
    assert sorted(seen) == list(range(num_chunks))
    assert desk.is_complete(version)
