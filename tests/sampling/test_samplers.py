from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_problem import unchecked

from isgd_jax.sampling import double_float, samplers
from isgd_jax.sampling.law import Law, at_fractions
from isgd_jax.types import Draw

EXACT = [samplers.independent, samplers.stratified, samplers.systematic]
ALL = [*EXACT, samplers.without_replacement, samplers.poisson, samplers.uniform, samplers.uniform_strata]


prepare, update = jax.jit(samplers.prepare), jax.jit(samplers.update)
"""Compiled whole: outside jit, each of some fifty operations is a program of its own."""


@cache
def repeated(sampler: Callable, num_draws: int, repeats: int) -> Callable[[jax.Array, Law], Draw]:
    each = jax.vmap(partial(sampler, num_draws=num_draws), (0, None))
    return jax.jit(lambda key, law: each(jax.random.split(key, repeats), law))


def many(sampler: Callable, law: Law, num_draws: int, repeats: int, seed: int = 0) -> Draw:
    return repeated(sampler, num_draws, repeats)(jax.random.key(seed), law)


def counts(draw: Draw, size: int) -> np.ndarray:
    """How often each index was drawn, over all repeats."""
    return np.bincount(np.asarray(draw.indices)[np.asarray(draw.mask)], minlength=size)


def log_normal(size: int, sigma: float, mixture: float = 0.0, seed: int = 0) -> np.ndarray:
    scores = np.random.default_rng(seed).lognormal(0.0, sigma, size)
    return ((1 - mixture) * scores / scores.sum() + mixture / size).astype(np.float32)


def at_offsets(
    monkeypatch: pytest.MonkeyPatch, sampler: Callable, law: Law, num_draws: int, offsets: np.ndarray
) -> Draw:
    """The draws of a sampler when its random numbers are all ``offsets[0]``, then all ``offsets[1]``, and so on."""

    def one(offset: jax.Array, law: Law) -> Draw:
        monkeypatch.setattr(samplers, "_unit_pair", lambda key, size, step: double_float.exact(jnp.full(size, offset)))
        return sampler(jax.random.key(0), law, num_draws=num_draws)

    return jax.jit(jax.vmap(one, (0, None)))(jnp.asarray(offsets, jnp.float32), law)


GRID = (np.arange(5000) + 0.5) / 5000
"""Fine enough for expectations without chance."""


@pytest.mark.parametrize("num_draws", [7, 1])
@pytest.mark.parametrize("sampler", EXACT)
def test_probs_is_the_expected_count_by_enumeration(
    monkeypatch: pytest.MonkeyPatch, sampler: Callable, num_draws: int
) -> None:
    masses = np.array([0.3, 0.0, 0.02, 0.4, 0.05, 0.05, 0.1, 0.08], np.float32)
    order = np.array([3, 1, 0, 7, 6, 5, 4, 2], np.int32)
    law = prepare(jnp.asarray(masses), jnp.asarray(order))
    draw = at_offsets(monkeypatch, sampler, law, num_draws, GRID)
    expected = counts(draw, 8) / (5000 * num_draws)
    np.testing.assert_allclose(expected, masses, atol=2 / 5000)
    np.testing.assert_allclose(np.asarray(draw.probs), masses[np.asarray(draw.indices)], rtol=1e-6)


def test_uniform_strata_are_equal_parts_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # 8 examples, 3 draws: a stratum is 8/3 of an example long, whatever the masses are.
    order = np.array([3, 1, 0, 7, 6, 5, 4, 2], np.int32)
    law = prepare(jnp.asarray([0.3, 0.0, 0.02, 0.4, 0.05, 0.05, 0.1, 0.08]), jnp.asarray(order))
    draw = at_offsets(monkeypatch, samplers.uniform_strata, law, 3, GRID)
    np.testing.assert_allclose(counts(draw, 8) / (5000 * 3), 1 / 8, atol=2 / 5000)
    np.testing.assert_array_equal(draw.probs, np.float32(1 / 8))
    places = np.argsort(order)[np.asarray(draw.indices)]
    np.testing.assert_array_equal(places.min(axis=0), [0, 2, 5])
    np.testing.assert_array_equal(places.max(axis=0), [2, 5, 7])


def test_inclusion_probabilities_by_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    # kappa = 5: two of the four draws are certain, and the rest shares the other two.
    masses = np.array([0.5, 0.3, 0.08, 0.06, 0.04, 0.02], np.float32)
    inclusion = np.array([1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    law = prepare(jnp.asarray(masses))
    draw = at_offsets(monkeypatch, samplers.without_replacement, law, 4, GRID)
    np.testing.assert_allclose(counts(draw, 6) / 5000, inclusion, atol=2 / 5000)
    np.testing.assert_allclose(np.asarray(draw.probs), (inclusion / 4)[np.asarray(draw.indices)], rtol=1e-5)


@pytest.mark.parametrize("sampler", ALL)
def test_probs_is_the_expected_count_by_chance(sampler: Callable) -> None:
    # z of each of 50 counts; P(some |z| > 5) < 3e-5 for independent counts, less for the others.
    law = prepare(jnp.asarray(log_normal(50, 1.5)))
    draw = many(sampler, law, 8, 20_000)
    probs = np.zeros(50)
    probs[np.asarray(draw.indices)] = np.asarray(draw.probs)
    mean = 20_000 * 8 * probs
    seen = mean > 0
    assert np.all(np.abs(counts(draw, 50) - mean)[seen] < 5 * np.sqrt(mean[seen]) + 2)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ALL)
def test_a_draw_has_static_shapes_and_knows_its_padding(sampler: Callable) -> None:
    draw = many(sampler, prepare(jnp.asarray(log_normal(50, 1.0))), 8, 20_000)
    assert draw.indices.shape == draw.probs.shape == draw.mask.shape == (20_000, 8)
    assert (draw.indices.dtype, draw.probs.dtype, draw.mask.dtype) == (jnp.int32, jnp.float32, bool)
    assert bool(jnp.all(draw.mask)) == (sampler is not samplers.poisson)


@pytest.mark.slow
def test_distinct_indices_without_replacement() -> None:
    law = prepare(jnp.asarray(log_normal(50, 2.0)))
    indices = np.sort(np.asarray(many(samplers.without_replacement, law, 8, 20_000).indices), axis=1)
    assert np.all(np.diff(indices, axis=1) > 0)
    once = np.asarray(many(samplers.systematic, jax.jit(partial(samplers.capped, num_draws=8))(law), 8, 20_000).indices)
    np.testing.assert_array_equal(np.sort(once, axis=1), indices)


@pytest.mark.parametrize("largest", [1e25, 1.0, 1e-30])
def test_all_examples_with_mass_are_drawn_once_however_much_masses_differ(largest: float) -> None:
    masses = np.append(np.geomspace(max(largest * 1e-43, 3e-38), largest, 40), 0.0).astype(np.float32)
    size = int(np.count_nonzero(masses))
    draw = many(samplers.without_replacement, jnp.asarray(masses), size, 200)
    np.testing.assert_array_equal(np.sort(draw.indices, axis=1), np.broadcast_to(np.arange(size), (200, size)))
    np.testing.assert_allclose(draw.probs, 1 / size, rtol=1e-6)


@pytest.mark.slow
def test_systematic_counts_are_floor_or_ceil() -> None:
    masses = log_normal(50, 1.0)
    indices = np.asarray(many(samplers.systematic, prepare(jnp.asarray(masses)), 8, 20_000).indices)
    each = np.stack([(indices == index).sum(axis=1) for index in range(50)], axis=1)
    assert np.all(np.abs(each - 8 * masses) < 1)


@pytest.mark.slow
def test_stratified_draws_once_in_every_equal_mass() -> None:
    masses = log_normal(50, 2.0)
    edges = np.concatenate([[0.0], np.cumsum(masses.astype(np.float64))])
    edges /= edges[-1]
    indices = np.asarray(many(samplers.stratified, prepare(jnp.asarray(masses)), 8, 20_000).indices)
    strata = np.arange(8)
    assert np.all(edges[indices] < (strata + 1) / 8 + 1e-9)
    assert np.all(edges[indices + 1] > strata / 8 - 1e-9)


HOSTILE = {
    "one huge": [1e-8] * 20 + [1.0] + [1e-8] * 20,
    "trailing zeros": [1.0, 2.0, 3.0],
    "leading zeros": [0.0] * 255 + [1.0, 2.0],
    "zeros between": [0.0, 1.0, 0.0, 0.0, 2.0, 0.0] * 20,
    "no square": [1.0] * 257,
    "one past a block": [1.0] * 17,
    "unnormalised, huge": [1e30, 2e30, 0.0, 3e30],
    "unnormalised, tiny": [1e-25, 2e-25, 0.0, 3e-25],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stratified", "systematic"])
def test_draws_of_one_key_are_spread_evenly_over_the_steps(kind: samplers.Kind) -> None:
    """Counts stay within 3 of what is expected: independent steps are off by its root, 14 for the largest here."""
    size, num_draws, steps = 500, 8, 1000
    law = prepare(jnp.asarray(log_normal(size, 1.0, mixture=0.1)))

    @jax.jit
    def drawn(key: jax.Array) -> jax.Array:
        one = partial(samplers.on_line, kind, key, law, num_draws=num_draws)
        return jax.vmap(lambda step: one(step=step).indices)(jnp.arange(steps))

    expected = np.cumsum(np.outer(np.ones(steps), np.asarray(samplers.probabilities(law)) * num_draws), axis=0)
    assert expected[-1].max() > 150
    for seed in range(3):
        found = np.zeros((steps, size))
        np.add.at(found, (np.arange(steps)[:, None], np.asarray(drawn(jax.random.key(seed)))), 1)
        assert np.abs(np.cumsum(found, axis=0) - expected).max() < 3.0, "at every step, for each example"


@pytest.mark.parametrize("is_halved", [False, True])
@pytest.mark.parametrize("kind", ["stratified", "systematic"])
def test_each_draw_of_a_key_is_distributed_by_the_law(kind: samplers.Kind, is_halved: bool) -> None:
    """Over keys, at any step: 4.5 standard errors for each example."""
    law, keys = prepare(jnp.asarray(log_normal(30, 1.0))), jax.random.split(jax.random.key(0), 4000)

    @jax.jit
    def drawn(step: jax.Array) -> Draw:
        given = {"num_draws": 7, "is_halved": jnp.asarray(is_halved), "step": step}
        return jax.vmap(lambda key: samplers.on_line(kind, key, law, **given))(keys)

    for step in (0, 5, 2**31 - 1):
        draw = drawn(jnp.int32(step))
        found = np.zeros((len(keys), 30))
        np.add.at(found, (np.arange(len(keys))[:, None], np.asarray(draw.indices)), 1)
        expected = 7 * np.asarray(samplers.probabilities(law))
        error = np.maximum(found.std(axis=0), 0.01) / np.sqrt(len(keys))
        assert np.all(np.abs(found.mean(axis=0) - expected) < 4.5 * error)
        np.testing.assert_allclose(draw.probs, np.asarray(samplers.probabilities(law))[draw.indices], rtol=1e-6)


@pytest.mark.parametrize(
    "sampler", [samplers.stratified, *(pytest.param(s, marks=pytest.mark.slow) for s in EXACT[::2])]
)
def test_mass_zero_is_never_drawn(sampler: Callable) -> None:
    for name, masses in HOSTILE.items():
        masses = np.pad(masses, (0, 257 - len(masses)))
        draw = many(sampler, prepare(jnp.asarray(masses, jnp.float32)), 5, 2000)
        drawn = masses[np.asarray(draw.indices)]
        assert np.all(drawn > 0), name
        np.testing.assert_allclose(draw.probs, drawn / masses.sum(), rtol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 17])
def test_small_laws(size: int) -> None:
    draw = many(samplers.stratified, prepare(jnp.full(size, 2.0)), size, 100)
    np.testing.assert_array_equal(draw.indices, np.broadcast_to(np.arange(size), (100, size)))
    np.testing.assert_allclose(draw.probs, 1 / size, rtol=1e-6)


@pytest.mark.slow
def test_both_ends_of_the_line_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    # Even an offset of 1, which no generator gives but roundings might.
    offsets = np.array([0.0, 1.0 - 2.0**-24, 1.0])
    for name, masses in HOSTILE.items():
        masses = np.pad(masses, (0, 257 - len(masses)))
        law = prepare(jnp.asarray(masses, jnp.float32))
        indices = at_offsets(monkeypatch, samplers.stratified, law, 7, offsets).indices
        assert np.all(masses[np.asarray(indices)] > 0), name


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ALL)
def test_an_all_zero_law_is_uniform(sampler: Callable) -> None:
    draw = many(sampler, prepare(jnp.zeros(50)), 8, 20_000)
    size = float(jnp.sum(draw.mask)) / 50
    assert np.all(np.abs(counts(draw, 50) - size) < 5 * np.sqrt(size) + 2)
    np.testing.assert_allclose(np.unique(draw.probs), draw.probs[0, 0], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, -1e-30])
def test_a_mass_that_is_none_is_refused_or_shows(bad: float) -> None:
    masses, law = jnp.asarray([1.0, bad, 2.0]), samplers.prepare(jnp.ones(3))
    at, own = jnp.arange(1), masses[1:2]
    for call in (
        lambda: samplers.prepare(masses),
        lambda: samplers.independent(jax.random.key(0), masses, num_draws=4),
        lambda: samplers.update(law, at, own),
    ):
        with pytest.raises(ValueError, match=r"masses must be at least 0 and finite, got .* at [01]"):
            call()
    draw = jax.jit(partial(samplers.independent, num_draws=4))(jax.random.key(0), masses)
    assert bool(jnp.all(jnp.isnan(draw.probs)))
    assert bool(jnp.all(jnp.isnan(samplers.probabilities(jax.jit(samplers.update)(law, at, own)))))


EDGES = {
    "subnormal": [1e-40, 3e-40, 0.0, 6e-40],
    "the smallest": [1.4e-45, 0.0, 2.8e-45],
    "tiny": [1e-37, 1e-36, 0.0, 2e-38],
    "sums beyond float32": [1e38, 3e38, 2e38, 3e38, 0.0],
    "the largest": [3.4e38] * 40,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EDGES)
def test_masses_at_the_edges_of_float32_have_their_shares(name: str) -> None:
    masses = np.asarray(EDGES[name], np.float32)
    shares = masses.astype(np.float64) / masses.astype(np.float64).sum()
    law = prepare(jnp.asarray(masses))
    np.testing.assert_allclose(samplers.probabilities(law), shares, rtol=1e-6)
    draw = many(samplers.stratified, law, 5, 400)
    np.testing.assert_allclose(draw.probs, shares[np.asarray(draw.indices)], rtol=1e-6)
    np.testing.assert_allclose(counts(draw, len(masses)) / 2000, shares, atol=5 * np.sqrt(0.25 / 2000))


@pytest.mark.parametrize("sampler", ALL)
@pytest.mark.parametrize(("wrong", "error"), [(-1, ValueError), (0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_numbers_of_draws_that_are_none_are_refused(sampler: Callable, wrong: object, error: type[Exception]) -> None:
    with unchecked(), pytest.raises(error, match="num_draws must be"):
        sampler(jax.random.key(0), jnp.ones(3), num_draws=wrong)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("probs", lambda law: samplers.prepare([1.0, 2.0])),
        ("order", lambda law: samplers.prepare(jnp.ones(2), [1, 0])),
        ("probs", lambda law: samplers.stratified(jax.random.key(0), [1.0, 2.0], num_draws=1)),
        ("law", lambda law: samplers.uniform(jax.random.key(0), [1.0, 2.0], num_draws=1)),
        ("indices", lambda law: samplers.update(law, [0], jnp.ones(1))),
        ("probs", lambda law: samplers.update(law, jnp.zeros(1, int), [1.0])),
    ],
)
def test_lists_are_refused(name: str, call: Callable) -> None:
    law = prepare(jnp.ones(2))
    with unchecked(), pytest.raises(TypeError, match=rf"{name} must be an array, np.asarray\(...\), got list"):
        call(law)


def test_probabilities_of_what_is_no_example_show() -> None:
    found = samplers.probabilities_of(prepare(jnp.asarray([1.0, 3.0])), jnp.asarray([1, 2, -1, 0]))
    np.testing.assert_array_equal(found, [0.75, np.nan, np.nan, 0.25])


@pytest.mark.parametrize("kind", ["stratified", "systematic", "independent"])
def test_four_ways_to_draw_are_unbiased_in_one_program(kind: samplers.Kind) -> None:
    # 5 draws: halves of 2 and of 3. Estimates of the mean of values, within 5 standard errors.
    masses, values = jnp.asarray(log_normal(40, 1.0)), np.random.default_rng(1).normal(size=40) + 1.0
    law = prepare(masses, samplers.order_by(masses))
    draw = jax.jit(partial(samplers.on_line, kind, num_draws=5))
    each = jax.vmap(lambda key, halved, opened: draw(key, law, is_halved=halved, is_open=opened), (0, None, None))
    for halved in (False, True):
        for opened in (False, True):
            found = each(jax.random.split(jax.random.key(2), 4000), jnp.asarray(halved), jnp.asarray(opened))
            indices, probs = np.asarray(found.indices), np.asarray(found.probs, np.float64)
            wanted = np.asarray(samplers.probabilities(law)) if opened else np.full(40, 1 / 40)
            np.testing.assert_allclose(probs, wanted[indices], rtol=1e-6)
            terms = values[indices] / (40 * probs)
            halves = terms[:, :2].mean(axis=1), terms[:, 2:].mean(axis=1)
            for estimates in (terms.mean(axis=1), *(halves if halved else ())):
                assert abs(estimates.mean() - values.mean()) < 5 * estimates.std() / np.sqrt(4000)
            if halved:  # what one half does tells nothing of the other
                assert abs(np.corrcoef(*halves)[0, 1]) < 5 / np.sqrt(4000)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "ordered"), [(1, False), (16, True), (17, False), (1000, True), (4096, False)])
def test_update_gives_the_law_that_prepare_builds(size: int, ordered: bool) -> None:
    rng = np.random.default_rng(size)
    masses, order = log_normal(size, 2.0), jnp.asarray(rng.permutation(size), jnp.int32) if ordered else None
    chosen = rng.choice(size, min(size, 40), replace=False)
    values = rng.random(len(chosen)).astype(np.float32)
    padded = np.concatenate([chosen, [size, size, -1]]).astype(np.int32)
    updated = update(prepare(jnp.asarray(masses), order), jnp.asarray(padded), jnp.asarray([*values, 9.0, 9.0, 9.0]))
    masses[chosen] = values
    jax.tree.map(np.testing.assert_array_equal, updated, prepare(jnp.asarray(masses), order))


@pytest.mark.slow
def test_duplicates_in_an_update() -> None:
    law = update(prepare(jnp.ones(20)), jnp.asarray([3, 3, 3]), jnp.asarray([5.0, 5.0, 5.0]))
    jax.tree.map(np.testing.assert_array_equal, law, prepare(jnp.ones(20).at[3].set(5.0)))


def test_a_donated_law_is_changed_in_place() -> None:
    """No array as large as one of the law is copied by the compiled program; an empty change is none."""
    size = 100_003
    law = jax.eval_shape(lambda x: samplers.prepare(x, x.astype(jnp.int32)), jax.ShapeDtypeStruct((size,), jnp.float32))
    given = (jax.ShapeDtypeStruct((7,), kind) for kind in (jnp.int32, jnp.float32))
    text = jax.jit(samplers.update, donate_argnums=0).lower(law, *given).compile().as_text()
    large = [f"[{','.join(map(str, leaf.shape))}]" for leaf in law]
    assert all(shape in text for shape in large)
    copied = [line for line in text.splitlines() if " copy(" in line and any(x in line for x in large)]
    assert copied == []
    law = prepare(jnp.ones(20))
    jax.tree.map(np.testing.assert_array_equal, update(law, jnp.zeros(0, jnp.int32), jnp.zeros(0)), law)


def test_probabilities_are_in_the_order_of_the_examples() -> None:
    masses = log_normal(50, 1.0)
    law = prepare(jnp.asarray(masses), samplers.order_by(jnp.asarray(masses)))
    np.testing.assert_allclose(samplers.probabilities(law), masses / masses.sum(), rtol=1e-6)


def test_order_by_sorts_by_the_first_key_first() -> None:
    order = samplers.order_by(jnp.asarray([1, 0, 1, 0]), jnp.asarray([0.5, 2.0, 0.1, 1.0]))
    assert order.tolist() == [3, 1, 2, 0]


def attained(law: Law, fractions: np.ndarray) -> np.ndarray:
    """Where the sampler lands when its random number is one of the 48-bit values nearest to ``fractions``."""
    bits = np.floor(fractions * 2.0**48)
    high = np.floor(bits / 2.0**24)
    low = bits - high * 2.0**24

    @jax.jit
    def place(law: Law, high: jax.Array, low: jax.Array) -> jax.Array:
        unit = double_float.two_sum(high, low)
        return at_fractions(law, unit, jnp.float32(1.0))[0]

    return np.asarray(place(law, jnp.asarray(high * 2.0**-24, jnp.float32), jnp.asarray(low * 2.0**-48, jnp.float32)))


@pytest.mark.slow
@pytest.mark.parametrize("size", [10_000, pytest.param(2_000_000, marks=pytest.mark.slow)])
def test_every_positive_mass_can_be_drawn(size: int) -> None:
    # Computed, not drawn: aim at the middle of every example's share of the line.
    masses = log_normal(size, 3.0, mixture=0.1).astype(np.float64)
    ends = np.cumsum(masses)
    np.testing.assert_array_equal(
        attained(prepare(jnp.asarray(masses, jnp.float32)), (ends - masses / 2) / ends[-1]), np.arange(size)
    )


def test_a_giant_starves_nobody() -> None:
    masses = np.full(1000, 1e-9)
    masses[500] = 0.9
    ends = np.cumsum(masses.astype(np.float32).astype(np.float64))
    middles = np.concatenate([[0.0], ends[:-1]]) / 2 + ends / 2
    found = attained(prepare(jnp.asarray(masses, jnp.float32)), middles / ends[-1])
    np.testing.assert_array_equal(found, np.arange(1000))


@pytest.mark.slow
def test_chi_square_of_equal_mass_cells_against_float64() -> None:
    # 1,000 cells of equal mass; the statistic has mean 999 and standard deviation 45.
    masses = log_normal(100_000, 3.0, mixture=0.1)
    cells = np.searchsorted(np.linspace(0, 1, 1001)[1:-1], np.cumsum(masses.astype(np.float64) / masses.sum()))
    share = np.bincount(cells, masses.astype(np.float64), 1000)
    share /= share.sum()
    draw = many(samplers.independent, prepare(jnp.asarray(masses)), 400_000, 1)
    expected = 400_000 * share
    statistic = np.sum(
        (np.bincount(cells[np.asarray(draw.indices[0])], minlength=1000) - expected)[expected > 0] ** 2
        / expected[expected > 0]
    )
    degrees = np.sum(expected > 0) - 1
    assert abs(statistic - degrees) < 4 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("size", [0, 2**31])
def test_laws_that_int32_cannot_index_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=r"1 to 2\^31 - 1 examples"):
        jax.eval_shape(samplers.prepare, jax.ShapeDtypeStruct((size,), jnp.float32))


@pytest.mark.parametrize("sampler", [samplers.without_replacement, samplers.poisson])
def test_more_distinct_draws_than_examples_are_refused(sampler: Callable) -> None:
    with pytest.raises(ValueError, match="distinct indices"):
        sampler(jax.random.key(0), jnp.ones(3), num_draws=4)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ALL)
def test_an_array_of_probabilities_is_a_law_too(sampler: Callable) -> None:
    masses = jnp.asarray(log_normal(50, 1.0))
    draws = [many(sampler, law, 8, 20_000) for law in (masses, prepare(masses))]
    jax.tree.map(np.testing.assert_array_equal, *draws)


@pytest.mark.slow
@pytest.mark.devices(8)
def test_a_law_sharded_over_devices_draws_the_same() -> None:
    masses = log_normal(4096, 2.0)
    law = prepare(jnp.asarray(masses), samplers.order_by(jnp.asarray(masses)))
    mesh = jax.make_mesh((8,), ("shard",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(law, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("shard")))
    draw = jax.jit(partial(samplers.stratified, num_draws=64))
    jax.tree.map(np.testing.assert_array_equal, draw(jax.random.key(0), sharded), draw(jax.random.key(0), law))
    at, values = jnp.arange(5, dtype=jnp.int32), jnp.ones(5)
    updated = update(sharded, at, values)
    jax.tree.map(np.testing.assert_array_equal, updated, update(law, at, values))


@pytest.mark.parametrize(("room", "whole"), [(1, 400), (3, 6), (16, 32)])
def test_a_part_of_poisson_expects_its_part_of_the_draws_and_is_unbiased_though_its_room_is_small(
    room: int, whole: int
) -> None:
    """Of one place for three quarters of a draw, one batch in six has too many."""
    probs = jnp.asarray(np.arange(1.0, 41.0) / 820, jnp.float32)
    law, keys = samplers.prepare(probs), jax.random.split(jax.random.key(0), 20_000)
    part = jax.jit(jax.vmap(lambda key: samplers.poisson(key, law, num_draws=room, part_of=whole)))(keys)
    mask, chosen = np.asarray(part.mask), np.asarray(part.probs)
    found = np.zeros((len(keys), 40))
    weights = np.where(mask, 1.0 / np.where(mask, chosen * room, 1.0), 0.0)
    np.add.at(found, (np.arange(len(keys))[:, None], np.asarray(part.indices)), weights)
    error = found.std(axis=0, ddof=1) / np.sqrt(len(keys))
    assert np.all(np.abs(found.mean(axis=0) - 1.0) <= 4.5 * error)
    expected = samplers.poisson_size(whole) * room / whole
    if room > 1:  # of the others some are left out
        assert abs(mask.sum(axis=1).mean() - expected) < 4.5 * np.sqrt(expected / len(keys))


def test_poisson_includes_each_of_a_few_examples_with_mass_once() -> None:
    # Expected sizes of 12 for 4 examples: the inclusion probability is 1, not 12/4 of it.
    probs = jnp.zeros(40).at[:4].set(jnp.asarray([0.1, 0.2, 0.3, 0.4]))
    draw = samplers.poisson(jax.random.key(0), probs, num_draws=32)
    found = np.asarray(draw.mask)
    assert sorted(np.asarray(draw.indices)[found]) == [0, 1, 2, 3]
    np.testing.assert_allclose(np.asarray(draw.probs)[found], 1.0 / 32.0, rtol=1e-6)
