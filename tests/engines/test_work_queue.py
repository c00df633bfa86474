"""The work queue: enumeration of small cases, and random histories held against a model of what must be true."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isgd_jax.engines.chunks import Chunks
from isgd_jax.engines.work_queue import WorkItem, WorkQueue

TIMEOUT = 10.0
SCORES = np.zeros(2, np.float32)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(num_chunks: int = 4, **options: Any) -> tuple[WorkQueue, Clock]:
    clock = Clock()
    queue = WorkQueue(Chunks(2 * num_chunks - 1, 2), timeout=TIMEOUT, now=clock, **options)
    queue.set_version(0)
    return queue, clock


def scores(queue: WorkQueue, item: WorkItem, num_chunks: int = 4) -> np.ndarray:
    """What a worker finds: the chunk and the version, so that a mix-up shows. The last chunk is one short."""
    size = 1 if item.chunk == num_chunks - 1 else 2
    return np.full(size, 100.0 * item.version + item.chunk, np.float32)


def handed(queue: WorkQueue, count: int, *, version: int = 0, worker: str = "a") -> list[WorkItem]:
    items = [queue.next_item(worker, version) for _ in range(count)]
    return [item for item in items if item is not None]


def test_a_sweep_goes_round_and_rests_when_all_is_scored() -> None:
    queue, _ = make()
    assert [item.chunk for item in handed(queue, 6)] == [0, 1, 2, 3]
    queue.set_version(1)
    assert [item.chunk for item in handed(queue, 6, version=1)] == [0, 1, 2, 3]


def test_a_newer_version_goes_on_where_the_sweep_stands() -> None:
    queue, _ = make()
    assert [item.chunk for item in handed(queue, 3)] == [0, 1, 2]
    queue.set_version(1)
    assert [item.chunk for item in handed(queue, 9, version=1)] == [3, 0, 1, 2]


def test_results_come_back_once_in_the_order_of_arrival() -> None:
    queue, _ = make()
    items = handed(queue, 4)
    for item in (items[2], items[0], items[3]):
        assert queue.complete(item, scores(queue, item)) is None
    assert [(int(c.ids[0]), c.version, c.scores.tolist()) for c in queue.collect()] == [
        (4, 0, [2.0, 2.0]), (0, 0, [0.0, 0.0]), (6, 0, [3.0]),
    ]  # fmt: skip
    assert queue.collect() == []
    assert queue.missing(0) == 1
    assert not queue.is_complete(0)
    queue.complete(items[1], scores(queue, items[1]))
    assert queue.is_complete(0)


def test_a_result_twice_or_of_an_older_version_changes_nothing() -> None:
    queue, _ = make()
    (old,) = handed(queue, 1)
    queue.set_version(1)
    new = next(item for item in handed(queue, 4, version=1, worker="b") if item.chunk == old.chunk)
    for item in (new, new, old, old):
        assert queue.complete(item, scores(queue, item)) is None
    assert [(chunk.version, chunk.scores[0]) for chunk in queue.collect()] == [(1, 100.0)]
    assert (queue.counts.taken, queue.counts.repeated) == (1, 3)


def test_a_lower_version_begins_another_run_and_nothing_of_the_first_gets_into_it() -> None:
    queue, _ = make()
    queue.set_version(7)
    first = handed(queue, 3, version=7)
    queue.complete(first[0], scores(queue, first[0]))
    queue.set_version(0)
    assert queue.missing(0) == 4
    assert queue.complete(first[1], scores(queue, first[1])) is None
    assert queue.collect() == []
    second = handed(queue, 6)
    assert [item.chunk for item in second] == [3, 0, 1, 2]  # in turn, where the first run stood
    queue.set_version(9)
    for item in (first[2], *second):  # of the first run, at a version that the second has passed
        assert queue.complete(item, scores(queue, item)) is None
    assert {chunk.version for chunk in queue.collect()} == {0}
    assert (queue.counts.taken, queue.counts.repeated, queue.counts.refused) == (5, 2, 0)


def test_only_the_newest_result_of_a_chunk_waits_for_the_trainer() -> None:
    queue, _ = make()
    for version in range(5):
        queue.set_version(version)
        for item in handed(queue, 4, version=version):
            queue.complete(item, scores(queue, item))
    assert [chunk.version for chunk in queue.collect()] == [4, 4, 4, 4]


def test_an_item_not_back_in_time_is_handed_out_again_and_first() -> None:
    queue, clock = make()
    late = handed(queue, 2, worker="slow")
    clock.now = TIMEOUT
    again = handed(queue, 4, worker="quick")
    assert [item.chunk for item in again] == [0, 1, 2, 3]
    assert queue.counts.again == 2
    queue.complete(again[0], scores(queue, again[0]))
    queue.complete(late[0], scores(queue, late[0]))
    queue.complete(late[1], scores(queue, late[1]))  # late, but the first: it is used, and the copy changes nothing
    queue.complete(again[1], scores(queue, again[1]))
    assert [int(chunk.ids[0]) for chunk in queue.collect()] == [0, 2]
    assert queue.counts.repeated == 2


def test_items_of_a_worker_that_left_are_handed_out_again() -> None:
    queue, _ = make()
    handed(queue, 2, worker="gone")
    handed(queue, 1, worker="here")
    queue.requeue("gone")
    assert [item.chunk for item in handed(queue, 4, worker="here")] == [0, 1, 3]


def test_a_worker_that_holds_old_parameters_says_so_with_its_scores() -> None:
    queue, _ = make()
    queue.set_version(5)
    item = queue.next_item("a", 3)
    assert item is not None
    queue.complete(item, scores(queue, item))
    assert [chunk.version for chunk in queue.collect()] == [3]


def test_the_cursor_is_kept_and_set() -> None:
    queue, _ = make()
    handed(queue, 3)
    assert queue.cursor == 3
    other, _ = make()
    other.cursor = 3
    assert [item.chunk for item in handed(other, 2)] == [3, 0]


@pytest.mark.parametrize(
    ("item", "found", "fingerprint", "wrong"),
    [
        (
            WorkItem(0, 0),
            np.zeros(3, np.float32),
            "ours",
            r"expected \[2\] floating-point scores, got float32\[3\]",
        ),
        (WorkItem(3, 0), np.zeros(2, np.float32), "ours", r"expected \[1\]"),
        (WorkItem(0, 0), np.zeros(2, np.int32), "ours", r"got int32\[2\]"),
        (WorkItem(4, 0), np.zeros(2, np.float32), "ours", "there is no chunk 4"),
        (WorkItem(-1, 0), np.zeros(2, np.float32), "ours", "there is no chunk -1"),
        (WorkItem(0, 1), np.zeros(2, np.float32), "ours", "no parameters of version 1 were published"),
        (WorkItem(0, -1), np.zeros(2, np.float32), "ours", "no parameters of version -1"),
        (WorkItem(0, 0), [0.0, 0.0], "ours", r"expected \[2\] floating-point scores, got a list"),
        (
            WorkItem(0, 0),
            (SCORES, np.zeros(2, np.float32)),
            "ours",
            r"expected \[2, dims\] .* sketches, got float32\[2\]",
        ),
        (
            WorkItem(0, 0),
            (SCORES, np.zeros((3, 4), np.float32)),
            "ours",
            r"expected \[2, dims\] .*, got float32\[3, 4\]",
        ),
        (WorkItem(0, 0), (SCORES, np.zeros((2, 4), np.int32)), "ours", r"expected \[2, dims\] .*, got int32\[2, 4\]"),
        (WorkItem(0, 0), (SCORES, SCORES, SCORES), "ours", "got a tuple of 3"),
        (WorkItem(0, 0), np.zeros(2, np.float32), "theirs", "another data set: expected .*'ours', got 'theirs'"),
    ],
)
def test_what_cannot_be_right_is_refused(item: WorkItem, found: Any, fingerprint: str, wrong: str) -> None:
    queue, _ = make(fingerprint="ours")
    said = queue.complete(item, found, fingerprint=fingerprint)
    assert said is not None
    with pytest.raises(AssertionError, match=wrong):
        raise AssertionError(said)
    assert queue.collect() == []
    assert queue.counts.refused == 1


def test_a_worker_with_other_data_is_told_so() -> None:
    queue, _ = make(fingerprint="ours")
    queue.check("ours")
    with pytest.raises(
        ValueError, match="another data set: expected fingerprint 'ours', got 'theirs'; give it the same"
    ):
        queue.check("theirs")


def test_scores_that_are_not_finite_are_for_the_table_to_judge() -> None:
    queue, _ = make()
    (item,) = handed(queue, 1)
    assert queue.complete(item, np.full(2, np.nan, np.float32)) is None
    assert len(queue.collect()) == 1


def test_sketches_come_back_with_their_scores() -> None:
    queue, _ = make()
    (item,) = handed(queue, 1)
    sketches = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert queue.complete(item, (SCORES, sketches)) is None
    (chunk,) = queue.collect()
    np.testing.assert_array_equal(chunk.scores, SCORES)
    np.testing.assert_array_equal(chunk.sketches, sketches)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["ask", "bring", "twice", "die", "wait", "publish", "collect"]), st.integers(0, 7)),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(actions=ACTIONS, num_chunks=st.integers(1, 5))
def test_any_history_keeps_the_guarantees(actions: list[tuple[str, int]], num_chunks: int) -> None:
    """Workers that ask, bring, bring twice, die and dawdle in any order; then they behave, and all gets scored."""
    queue, clock = make(num_chunks)
    version, out, kept = 0, [], dict.fromkeys(range(num_chunks), -1)
    for action, which in actions:
        worker = str(which % 3)
        if action == "ask":
            held = max(0, version - which % 2)  # some hold older parameters
            item = queue.next_item(worker, held)
            if item is not None:
                assert item.version == held
                assert held > kept[item.chunk], "scored at this version already"
                live = [o for w, o, due in out if o.chunk == item.chunk and due > clock.now and w != "dead"]
                assert all(o.version < held for o in live), "out with somebody at this version already"
                out.append((worker, item, clock.now + TIMEOUT))
        elif action in ("bring", "twice") and out:
            _, item, _ = out[which % len(out)]
            assert queue.complete(item, scores(queue, item, num_chunks)) is None
            kept[item.chunk] = max(kept[item.chunk], item.version)
            if action == "bring":
                out.pop(which % len(out))
        elif action == "die":
            queue.requeue(worker)
            out = [("dead" if w == worker else w, item, due) for w, item, due in out]
        elif action == "wait":
            clock.now += which
        elif action == "publish":
            version += 1
            queue.set_version(version)
        elif action == "collect":
            for chunk in queue.collect():
                assert chunk.scores[0] == 100.0 * chunk.version + chunk.ids[0] // 2
                assert chunk.version == kept[int(chunk.ids[0]) // 2]
    clock.now += TIMEOUT
    version += 1
    queue.set_version(version)
    seen = []
    while (item := queue.next_item("good", version)) is not None:
        seen.append(item.chunk)
        queue.complete(item, scores(queue, item, num_chunks))
    assert sorted(seen) == list(range(num_chunks))
    assert queue.is_complete(version)
