import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax.sampling import proposal, score_table
from isgd_jax.sampling.score_table import ScoreTable


def scored(scores: list[float], versions: list[int] | None = None, seconds: list[float] | None = None) -> ScoreTable:
    size = len(scores)
    return ScoreTable(
        jnp.asarray(scores, jnp.float32),
        jnp.asarray([0] * size if versions is None else versions, jnp.int32),
        jnp.asarray([0.0] * size if seconds is None else seconds, jnp.float32),
    )


def test_by_hand() -> None:
    made = proposal.propose(scored([1.0, 3.0]), version=0, mixture=0.5)
    np.testing.assert_allclose(made.probs, [0.25 * 0.5 + 0.25, 0.75 * 0.5 + 0.25], rtol=1e-6)
    assert float(made.trusted_share) == 1.0
    assert not bool(made.is_uniform)


HOSTILE = {
    "never scored": (scored([0.0, 0.0, 0.0], [-1, -1, -1]), True),
    "all-zero table": (scored([0.0, 0.0, 0.0]), True),
    "one huge score": (scored([3e38, 3e38, 1.0, 0.0]), False),
    "tiny scores": (scored([1e-38, 3e-38, 0.0]), False),
    "one example": (scored([2.0]), False),
    "half never scored": (scored([4.0, 0.0, 2.0, 0.0], [3, -1, 2, -1]), False),
    "trailing zeros": (scored([1.0, 2.0] + [0.0] * 50), False),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_probability_is_positive_and_they_sum_to_one(name: str) -> None:
    scores, _ = HOSTILE[name]
    made = jax.jit(lambda t: proposal.propose(t, version=3, mixture=0.1))(scores)
    assert np.all(np.asarray(made.probs) > 0)
    np.testing.assert_allclose(np.sum(np.asarray(made.probs), dtype=np.float64), 1.0, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_table_that_knows_nothing_is_uniform(name: str) -> None:
    scores, is_uniform = HOSTILE[name]
    made = proposal.propose(scores, version=3)
    assert bool(made.is_uniform) == is_uniform
    if is_uniform:
        np.testing.assert_array_equal(made.probs, np.float32(1.0) / np.float32(made.probs.shape[0]))


def test_too_small_a_trusted_share_is_uniform() -> None:
    scores = scored([5.0] + [1.0] * 19, [0] + [-1] * 19)
    assert bool(proposal.propose(scores, version=0, min_trusted=0.1).is_uniform)
    assert not bool(proposal.propose(scores, version=0, min_trusted=0.05).is_uniform)


@pytest.mark.parametrize("mixture", [0.05, 0.1, 0.5, 1.0])
def test_the_mixture_bounds_the_weights(mixture: float) -> None:
    scores = np.random.default_rng(0).lognormal(0, 4, 1000).astype(np.float32)
    probs, _ = proposal.smooth(jnp.asarray(scores), mixture=mixture)
    assert float(jnp.max(1.0 / (1000 * probs))) <= 1.0 / mixture * (1 + 1e-5)


def test_untrusted_scores_count_as_the_mean_trusted_score() -> None:
    scores = scored([2.0, 4.0, 100.0, 0.0], versions=[9, 9, 2, -1])
    made = proposal.propose(scores, version=10, max_age=5, mixture=0.1)
    np.testing.assert_allclose(made.probs, 0.9 * np.array([2.0, 4.0, 3.0, 3.0]) / 12.0 + 0.1 / 4, rtol=1e-6)
    assert float(made.trusted_share) == 0.5


def test_staleness_in_seconds() -> None:
    scores = scored([2.0, 4.0, 100.0], seconds=[95.0, 99.0, 10.0])
    made = proposal.propose(scores, version=0, seconds=100.0, max_age_seconds=20.0, mixture=0.1)
    np.testing.assert_allclose(made.probs, 0.9 * np.array([2.0, 4.0, 3.0]) / 9.0 + 0.1 / 3, rtol=1e-6)


def test_a_score_of_the_future_is_as_far_from_now_as_an_old_one() -> None:
    """One wrong reading of a clock, or one that was set back, would be believed until the clock comes there."""
    scores = scored([2.0, 4.0, 100.0, 100.0], seconds=[95.0, 105.0, 1e6, float("inf")])
    made = proposal.propose(scores, version=0, seconds=100.0, max_age_seconds=20.0, mixture=0.1)
    np.testing.assert_allclose(made.probs, 0.9 * np.array([2.0, 4.0, 3.0, 3.0]) / 12.0 + 0.1 / 4, rtol=1e-6)


def test_the_additive_constant_is_the_mixture_of_the_paper() -> None:
    scores, constant = jnp.asarray([1.0, 3.0, 8.0]), 2.0
    relative = constant / (float(jnp.mean(scores)) + constant)
    added, _ = proposal.smooth(scores, additive=constant, mixture=0.0)
    mixed, _ = proposal.smooth(scores, mixture=relative)
    np.testing.assert_allclose(added, mixed, rtol=1e-6)


def test_example_weights() -> None:
    probs, _ = proposal.smooth(jnp.asarray([2.0, 3.0]), mixture=0.0, example_weights=jnp.asarray([3.0, -1.0]))
    np.testing.assert_allclose(probs, [6.0 / 9.0, 3.0 / 9.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture": 0.0}, "no chance"),
        ({"mixture": 1.5}, "share of uniform draws"),
        ({"additive": -1.0}, "additive"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        proposal.propose(scored([1.0]), version=0, **options)


def test_one_program_serves_all_versions_and_clocks() -> None:
    traces = []

    @jax.jit
    def propose(scores: ScoreTable, version: jax.Array, seconds: jax.Array) -> proposal.Proposal:
        traces.append(version)
        return proposal.propose(scores, version=version, seconds=seconds, max_age=3, max_age_seconds=2.0)

    scores, _ = score_table.record(score_table.create(2), jnp.arange(2, dtype=jnp.int32), jnp.ones(2), version=0)
    shares = [float(propose(scores, jnp.int32(v), jnp.float32(v)).trusted_share) for v in range(5)]
    assert shares == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert len(traces) == 1


BAD = {
    "negative": [3.0, -1.0, 1.0, 0.5],
    "NaN": [1.0, np.nan, 3.0],
    "infinite": [np.inf, 1.0, 2.0],
    "all kinds": [np.nan, np.inf, -np.inf, -2.0, 1.0, 4.0],
}


@pytest.mark.parametrize("name", BAD)
def test_a_score_that_is_none_counts_as_the_mean_and_is_told(name: str) -> None:
    scores = np.asarray(BAD[name], np.float32)
    sound = np.isfinite(scores) & (scores >= 0)
    filled = np.where(sound, scores, scores[sound].mean())
    expected = 0.9 * filled / filled.sum() + 0.1 / len(scores)
    with pytest.warns(UserWarning, match=f"{(~sound).sum()} of {len(scores)} scores are negative or not finite"):
        probs, blank = proposal.smooth(jnp.asarray(scores), mixture=0.1)
    np.testing.assert_allclose(probs, expected, rtol=1e-6)
    assert not bool(blank)
    traced, _ = jax.jit(lambda s: proposal.smooth(s, mixture=0.1))(jnp.asarray(scores))
    np.testing.assert_allclose(traced, expected, rtol=1e-6)
    made = proposal.propose(scored(list(BAD[name])), version=0, mixture=0.1)
    np.testing.assert_allclose(made.probs, expected, rtol=1e-6)
    assert float(made.trusted_share) == np.float32(sound.mean())


def test_scores_that_are_all_none_are_uniform_and_blank() -> None:
    with pytest.warns(UserWarning, match="2 of 2 scores"):
        probs, blank = proposal.smooth(jnp.asarray([-1.0, np.nan]))
    assert probs.tolist() == [0.5, 0.5]
    assert bool(blank)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e30, 1e38])
@pytest.mark.parametrize("weighted", [False, True])
def test_scores_may_be_as_small_or_large_as_float32_goes(scale: float, weighted: bool) -> None:
    scores, weights = np.asarray([1.0, 2.0, 0.0, 3.0]), np.asarray([1.0, -2.0, 3.0, 0.5])
    wanted = scores * np.abs(weights) if weighted else scores
    given = jnp.asarray(weights * 1e-3, jnp.float32) if weighted else None
    probs, blank = proposal.smooth(jnp.asarray(scores * scale, jnp.float32), mixture=0.2, example_weights=given)
    np.testing.assert_allclose(probs, 0.8 * wanted / wanted.sum() + 0.05, rtol=1e-5)
    assert not bool(blank)


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="example_weights must be finite, got nan at 1"):
        proposal.smooth(jnp.ones(2), example_weights=jnp.asarray([1.0, np.nan]))
    with pytest.raises(ValueError, match="additive must be finite and not negative, got nan"):
        proposal.smooth(jnp.ones(2), additive=float("nan"))
