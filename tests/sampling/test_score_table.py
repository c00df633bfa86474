import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax.sampling import score_table


def rows(*numbers: float) -> jax.Array:
    return jnp.asarray(numbers, jnp.float32)


def ids(*numbers: int) -> jax.Array:
    return jnp.asarray(numbers, jnp.int32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1.0])
def test_unsound_scores_are_quarantined_and_the_old_entry_kept(bad: float) -> None:
    known, _ = score_table.record(score_table.create(4), ids(0, 1), rows(5.0, 6.0), version=3)
    after, rejected = jax.jit(score_table.record)(known, ids(0, 1, 2), rows(bad, 7.0, bad), version=4)
    assert int(rejected) == 2
    assert after.scores.tolist() == [5.0, 7.0, 0.0, 0.0]
    assert after.versions.tolist() == [3, 4, -1, -1]


def test_an_older_measurement_never_overwrites_a_newer_one() -> None:
    known, _ = score_table.record(score_table.create(3), ids(0), rows(5.0), version=10)
    after, rejected = score_table.record(known, ids(0, 1), rows(1.0, 2.0), version=9)
    assert int(rejected) == 0
    assert after.scores.tolist() == [5.0, 2.0, 0.0]
    assert after.versions.tolist() == [10, 9, -1]


def test_padding_is_neither_written_nor_counted() -> None:
    padded = ids(3, 1, 4, -1)
    after, rejected = score_table.record(score_table.create(3), padded, rows(float("nan"), 2.0, 9.0, 9.0), version=0)
    assert int(rejected) == 0
    assert after.scores.tolist() == [0.0, 2.0, 0.0]


def test_score_version_and_clock_are_written_together() -> None:
    after, _ = score_table.record(
        score_table.create(3), ids(2), rows(4.0), version=jnp.int32(7), seconds=jnp.float32(1.5)
    )
    assert [float(part[2]) for part in after] == [4.0, 7.0, 1.5]


def test_duplicates_write_one_of_them() -> None:
    after, rejected = score_table.record(score_table.create(2), ids(1, 1, 1), rows(2.0, 2.0, 2.0), version=0)
    assert after.scores.tolist() == [0.0, 2.0]
    assert int(rejected) == 0


def test_ages_count_versions_and_never_scored_is_oldest() -> None:
    known, _ = score_table.record(score_table.create(3), ids(0), rows(1.0), version=8)
    known, _ = score_table.record(known, ids(1), rows(1.0), version=0)
    assert score_table.ages(known, 10).tolist() == [2, 10, 11]


def test_an_empty_table_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        score_table.create(0)


def test_recording_is_jittable_with_a_traced_version_and_compiles_once() -> None:
    traces = []

    def record(scores: score_table.ScoreTable, version: jax.Array) -> score_table.ScoreTable:
        traces.append(version)
        return score_table.record(scores, ids(0), rows(1.0), version=version)[0]

    compiled, scores = jax.jit(record), score_table.create(2)
    for version in range(3):
        scores = compiled(scores, jnp.int32(version))
    assert len(traces) == 1
    np.testing.assert_array_equal(scores.versions, [2, -1])


def test_memory_keeps_a_running_mean_square() -> None:
    known, _ = score_table.record(score_table.create(2), ids(0), rows(3.0), version=0, memory=0.75)
    after, _ = score_table.record(known, ids(0, 1), rows(5.0, 7.0), version=1, memory=0.75)
    np.testing.assert_allclose(after.scores, [(0.75 * 9 + 0.25 * 25) ** 0.5, 7.0], rtol=1e-6)


def test_memory_tends_to_the_root_mean_square() -> None:
    measured = np.random.default_rng(0).exponential(size=4000).astype(np.float32)

    def visit(scores: score_table.ScoreTable, score: jax.Array) -> tuple[score_table.ScoreTable, jax.Array]:
        after, _ = score_table.record(scores, ids(0), score[None], version=0, memory=0.99)
        return after, jnp.square(after.scores[0])

    _, squares = jax.lax.scan(visit, score_table.create(1), jnp.asarray(measured))
    # The mean of an exponential's square is 2; over some 20 independent stretches of 200 visits, 3 standard errors.
    assert abs(float(jnp.mean(squares[500:])) - 2.0) < 3 * (20 / 3500) ** 0.5


@pytest.mark.parametrize("memory", [-0.1, 1.0])
def test_memory_is_a_share(memory: float) -> None:
    with pytest.raises(ValueError, match="memory is the share"):
        score_table.record(score_table.create(1), ids(0), rows(1.0), version=0, memory=memory)
