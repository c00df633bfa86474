"""Domains: unbiased for the integral whatever was scored, points always new, densities that are what they say."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sampling_problem import unchecked

import isgd_jax as isgd
from isgd_jax.sampling import boxes

KEY = jax.random.key(0)


def same(unit: jax.Array) -> jax.Array:
    return unit


def make(dims: int = 1, **options: Any) -> isgd.DomainSampler:
    settings: dict[str, Any] = {"dims": dims, "batch_size": 8, "num_boxes": 16}
    return isgd.domain_sampler(same, **settings | options)


def peak(points: jax.Array) -> jax.Array:
    """Large on a thousandth of the square."""
    return jnp.exp(-2_000.0 * jnp.sum(jnp.square(points - jnp.array([[0.3, 0.6]])), axis=1)) + 1e-3


def test_the_estimate_is_unbiased_for_the_integral_with_scores_that_are_noisy_old_and_learnt() -> None:
    """The mean of x² over [0, 1] is 1/3: 3,000 keys, 12 steps each with three refreshes, within 4 standard errors.

    One key serves a run. Scores are x⁴ with noise, and of the last refreshes zero where x is large: the worst there is.
    """
    domain = make(uniform_fraction=0.2)

    def run(key: jax.Array) -> jax.Array:
        def score(at: jax.Array, x: jax.Array) -> jax.Array:
            noise = jax.random.uniform(jax.random.fold_in(key, at), (len(x),), minval=0.5, maxval=2.0)
            return jnp.where((at > 6) & (x[:, 0] > 0.7), 0.0, noise * x[:, 0] ** 4)

        def step(state: isgd.DomainState, at: jax.Array) -> tuple[isgd.DomainState, jax.Array]:
            refreshed = domain.refresh(key, state, lambda x: score(at, x))
            state = jax.tree.map(lambda new, old: jnp.where(at % 4 == 1, new, old), refreshed, state)
            draw = domain.sample(key, state, at)
            return state, jnp.mean(draw.weights * draw.points[:, 0] ** 2)

        return jax.lax.scan(step, domain.init(), jnp.arange(12, dtype=jnp.int32))[1]

    found = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(KEY, 3_000)), np.float64)
    for which in (found.mean(axis=1), found[:, -1]):
        error = which.std(ddof=1) / len(which) ** 0.5
        assert error < 0.015 / 3
        assert abs(which.mean() - 1 / 3) < 4 * error


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_uniform_point_moved_lies_anywhere_with_the_density_that_is_told(dims: int) -> None:
    """Counts of 2¹⁸ spread points by box beside the boxes' mass, and their places beside `densities`."""
    points = isgd.quasi_random(KEY, 256, dims)
    scores = jnp.exp(-3.0 * jnp.sum(points, axis=1)) * jnp.where(points[:, 0] > 0.5, 0.0, 1.0)
    made = jax.jit(boxes.fitted)(points, scores, jnp.ones(256), uniform_fraction=0.1)
    assert float(jnp.sum(made.volume)) == pytest.approx(1.0, abs=1e-5)
    assert float(jnp.sum(made.mass)) == pytest.approx(1.0, abs=1e-5)
    assert float(jnp.min(made.mass / made.volume)) > 0.0999
    at, box = boxes.moved(made, isgd.quasi_random(jax.random.key(1), 1 << 18, dims))
    assert bool(jnp.all((at >= 0.0) & (at <= 1.0)))
    counts = np.bincount(np.asarray(box), minlength=32)
    np.testing.assert_allclose(counts / (1 << 18), made.mass, atol=2e-3)
    assert bool(jnp.all((at >= made.low[box]) & (at <= made.high[box])))
    inside = np.asarray(jnp.all((at > made.low[box]) & (at < made.high[box]), axis=1))
    told = np.asarray(boxes.densities(made, at))
    np.testing.assert_allclose(told[inside], np.asarray(made.mass / made.volume)[np.asarray(box)][inside], rtol=1e-6)
    for axis in range(dims):  # uniform within each box, along each axis
        share = (np.asarray(at) - np.asarray(made.low)[box])[:, axis] / np.asarray(made.high - made.low)[box][:, axis]
        assert share.mean() == pytest.approx(0.5, abs=0.01)
        assert (share < 0.25).mean() == pytest.approx(0.25, abs=0.01)


def test_boxes_follow_a_step_exactly_where_their_sides_can() -> None:
    """Scores 3 below a quarter and 1 above: mass 1/2 and 1/2, mixed with a tenth of the uniform 1/4 and 3/4."""
    points = (jnp.arange(64.0) + 0.5)[:, None] / 64
    made = jax.jit(boxes.fitted)(points, jnp.where(points[:, 0] < 0.25, 3.0, 1.0), jnp.ones(64), uniform_fraction=0.1)
    below = jnp.sum(jnp.where(made.high[:, 0] <= 0.25, made.mass, 0.0))
    assert float(below) == pytest.approx(0.9 * 0.5 + 0.1 * 0.25, abs=1e-6)


def test_the_report_is_the_second_moment_of_new_points_beside_uniform_ones_and_the_ideal() -> None:
    domain = make(dims=2, num_boxes=256, batch_size=64, uniform_fraction=0.2)
    refresh = jax.jit(lambda state: domain.refresh(KEY, state, peak))
    state = refresh(domain.init())
    assert float(state.drawn) == pytest.approx(1.0, abs=1e-5)
    state = refresh(refresh(state))
    found = domain.report(refresh(state))

    unit = isgd.quasi_random(jax.random.key(5), 1 << 17, 2)
    squares = np.asarray(peak(unit), np.float64) ** 2
    drawn = np.mean(squares / np.asarray(boxes.densities(state.boxes, unit))) / squares.mean()
    ideal = np.mean(np.sqrt(squares)) ** 2 / squares.mean()
    assert drawn < 0.05
    assert float(found.drawn) == pytest.approx(drawn, rel=0.5)
    assert float(found.ideal) == pytest.approx(ideal, rel=0.5)
    assert float(found.equivalent_batch) == pytest.approx(64 / float(found.drawn))
    assert "equivalent plain batch" in str(found)


def test_what_a_step_leaves_the_next_ones_average_out() -> None:
    """The variance of the mean over 32 steps between two refreshes is below a thirtieth of that of uniform points.

    A pool that serves all of these steps would leave its own error in each of them.
    """
    domain = make(dims=2, num_boxes=256, batch_size=8)
    state = jax.jit(lambda: jax.lax.fori_loop(0, 4, lambda _, s: domain.refresh(KEY, s, peak), domain.init()))()

    def means(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        draws = jax.vmap(lambda step: domain.sample(key, state, step))(jnp.arange(32))
        uniform = jax.random.uniform(key, (256, 2))
        return jnp.mean(draws.weights * jax.vmap(peak)(draws.points)), jnp.mean(peak(uniform))

    drawn, uniform = jax.jit(jax.vmap(means))(jax.random.split(jax.random.key(3), 500))
    assert float(jnp.var(drawn)) < float(jnp.var(uniform)) / 30
    assert abs(float(jnp.mean(drawn) / jnp.mean(uniform)) - 1) < 0.1


def test_no_weight_is_above_one_over_the_uniform_fraction_and_points_are_always_new() -> None:
    domain = make(dims=2, uniform_fraction=0.25, batch_size=512)
    sample, refresh = jax.jit(domain.sample), jax.jit(lambda state: domain.refresh(KEY, state, peak))
    state, seen = domain.init(), []
    for turn in range(3):
        for step in (2 * turn, 2 * turn + 1):
            draw = sample(KEY, state, step)
            assert float(jnp.max(draw.weights)) <= 4.0001
            assert float(jnp.mean(draw.weights)) == pytest.approx(1.0, abs=0.02)
            seen.append(np.asarray(draw.points))
        state = refresh(state)
    assert len(np.unique(np.concatenate(seen), axis=0)) == 6 * 512


@pytest.mark.parametrize(
    ("scores", "unusable"),
    [(lambda x: jnp.zeros(len(x)), 0), (lambda x: jnp.full(len(x), jnp.nan), 128), (lambda x: x[:, 0] * 0 - 1, 128)],
    ids=["zeros", "nan", "negative"],
)
def test_where_nothing_is_learnt_the_density_is_uniform_and_what_is_no_score_is_counted(
    scores: Any, unusable: int
) -> None:
    domain = make()
    state = jax.jit(lambda: domain.refresh(KEY, domain.init(), scores))()
    np.testing.assert_allclose(state.boxes.mass, state.boxes.volume, rtol=1e-5)
    assert int(domain.report(state).unusable) == unusable
    assert float(state.drawn) == 1.0


def test_the_state_keeps_its_types_where_float64_is_on() -> None:
    """So that it can be carried through a loop; scores and points of the caller may be wider."""
    with jax.enable_x64(True):
        domain = isgd.domain_sampler(lambda unit: unit.astype(jnp.float64), dims=2, batch_size=8, num_boxes=4)
        state = domain.init()
        after = jax.jit(lambda s: domain.refresh(KEY, s, lambda x: jnp.sum(x, axis=1)))(state)
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
        assert {str(x.dtype) for x in jax.tree.leaves(after)} == {"float32", "int32"}
        draw = domain.sample(KEY, after, 0)
        assert draw.points.dtype == jnp.float64
        assert draw.weights.dtype == jnp.float32


@pytest.mark.parametrize("size", [1e-30, 1e30, 3e38])
def test_scores_of_any_size_give_the_same_density(size: float) -> None:
    domain = make()
    refresh = jax.jit(lambda factor: domain.refresh(KEY, domain.init(), lambda x: x[:, 0] ** 2 * factor))
    wanted, found = refresh(1.0), refresh(size)
    np.testing.assert_allclose(found.boxes.mass, wanted.boxes.mass, rtol=1e-4)


def test_a_key_serves_a_run_and_steps_can_be_drawn_at_once() -> None:
    domain = make(dims=2)
    refresh = jax.jit(lambda state: domain.refresh(KEY, state, peak))
    state = refresh(domain.init())
    sample, steps = jax.jit(domain.sample), jnp.arange(5)
    at_once = jax.vmap(lambda step: domain.sample(KEY, state, step))(steps)
    for step in range(5):
        np.testing.assert_allclose(at_once.points[step], sample(KEY, state, step).points, rtol=1e-6)
    after = refresh(state)
    assert not np.any(np.asarray(sample(KEY, after, 0).points) == np.asarray(at_once.points[0]))


def test_two_terms_train_in_one_program_with_the_state_donated_and_weights_by_the_transform() -> None:
    """u' = 1 on [0, 1] with u(0) = 0 by u = a x + b; the weights go through `isgd_jax.importance_weighting`."""
    inside, border = make(batch_size=16), isgd.domain_sampler(lambda unit: 0 * unit, dims=1, batch_size=4, num_boxes=2)

    def equation(params: Any, x: Any) -> Any:
        return (jax.grad(lambda x: params["a"] * x + params["b"])(x[0]) - 1.0) ** 2

    def at_zero(params: Any, x: Any) -> Any:
        return (params["a"] * x[0] + params["b"]) ** 2

    terms = {"inside": (inside, equation), "border": (border, at_zero)}
    weighting = isgd.importance_weighting(1)

    def step(at: Any, carry: Any) -> Any:
        params, states = carry
        total = jax.tree.map(jnp.zeros_like, params)
        for name, (domain, loss_fn) in terms.items():
            draw = domain.sample(KEY, states[name], at)
            grads = isgd.per_example_grads(loss_fn)(params, draw.points)
            mean, _ = weighting.update(grads, weighting.init(params), params, probs=draw.probs, target=draw.target)
            wanted = isgd.weighted_mean(isgd.per_example_grads(loss_fn)(params, draw.points), draw.weights)
            total = jax.tree.map(lambda t, m, w: t + 0.5 * (m + w), total, mean, wanted)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, total), states

    def block(carry: Any) -> Any:
        params, states = carry
        for name, (domain, loss_fn) in terms.items():

            def score(points: Any, loss_fn: Any = loss_fn) -> Any:
                return isgd.norms(isgd.per_example_grads(loss_fn)(params, points))

            states = {**states, name: domain.refresh(KEY, states[name], score)}
        return jax.lax.fori_loop(0, 20, step, (params, states))

    compiled = jax.jit(block, donate_argnums=0)
    carry = (
        {"a": jnp.float32(0.0), "b": jnp.float32(1.0)},
        {name: domain.init() for name, (domain, _) in terms.items()},
    )
    for _ in range(10):
        carry = compiled(carry)
    assert compiled._cache_size() == 1
    assert float(carry[0]["a"]) == pytest.approx(1.0, abs=1e-3)
    assert float(carry[0]["b"]) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"place": 3}, "place must be a function"),
        ({"dims": 0}, "dims must be 1 or more"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"num_boxes": 100}, "num_boxes must be a power of two, got 100"),
        ({"num_boxes": 1}, "num_boxes must be 2 or more"),
        ({"num_boxes": 2**16}, "num_boxes must be at most 32768, got 65536"),
        ({"uniform_fraction": "auto"}, "uniform_fraction must be a number, got 'auto'"),
        ({"uniform_fraction": 0.0}, "uniform_fraction must be above 0 and at most 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_told_at_once(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"place": same, "dims": 1, "batch_size": 8} | change
    with unchecked(), pytest.raises((TypeError, ValueError), match=words):
        isgd.domain_sampler(arguments.pop("place"), **arguments)


def test_functions_that_give_something_else_are_told() -> None:
    domain = make()
    with pytest.raises(ValueError, match=r"score\(points\) must be one number a point, \[128\], got \(128, 1\)"):
        domain.refresh(KEY, domain.init(), lambda x: x)
    with unchecked(), pytest.raises(TypeError, match="score must be a function of new points, got a ndarray"):
        domain.refresh(KEY, domain.init(), np.ones(64))
    with pytest.raises(ValueError, match="place must return arrays with leading axis 8"):
        isgd.domain_sampler(lambda unit: unit[:3], dims=1, batch_size=8, num_boxes=16).sample(KEY, domain.init(), 0)
    with unchecked(), pytest.raises(TypeError, match=r"score\(points\) must be an array, .* got dict"):
        domain.refresh(KEY, domain.init(), lambda x: {"equation": x[:, 0]})
    with unchecked(), pytest.raises(TypeError, match=r"real numbers, got complex64: take their jnp.abs"):
        domain.refresh(KEY, domain.init(), lambda x: x[:, 0].astype(jnp.complex64))


def test_the_state_of_another_sampler_is_refused() -> None:
    """Boxes of one dimension broadcast: with them both coordinates of a point of the square lay in one interval."""
    line, square = make(dims=1), make(dims=2)
    state = line.refresh(KEY, line.init(), lambda x: x[:, 0])
    words = r"state must be this sampler's, with boxes \[num_boxes, dims\] of \(16, 2\), got \(16, 1\)"
    with pytest.raises(ValueError, match=words):
        square.sample(KEY, state, 0)
    with pytest.raises(ValueError, match=words):
        square.refresh(KEY, state, lambda x: x[:, 0])
    several = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(ValueError, match=r"\(2, 16, 1\).* several at once go through jax.vmap"):
        line.sample(KEY, several, 0)
    with unchecked(), pytest.raises(TypeError, match="state must be what init and refresh give, got a dict"):
        line.sample(KEY, state._asdict(), 0)


def test_a_step_of_any_whole_type_gives_its_own_points_and_another_is_refused() -> None:
    """int16 holds no 200 steps of 256 draws, and float32 turned every step past 2^32 draws into one."""
    domain = make(dims=2, batch_size=256)
    state = domain.init()
    wanted = domain.sample(KEY, state, 200).points
    with unchecked():
        for step in (np.int64(200), np.int16(200), np.uint8(200), jnp.int16(200), jnp.uint8(200), np.array(200)):
            np.testing.assert_array_equal(domain.sample(KEY, state, step).points, wanted)
        for step in (jnp.float32(200), 200.0, True, "200"):
            with pytest.raises(TypeError, match="step must be a whole number, got"):
                domain.sample(KEY, state, step)
        with pytest.raises(ValueError, match=r"step must be one whole number, got an array of shape \(256,\)"):
            domain.sample(KEY, state, jnp.arange(256))


def test_numbers_of_numpy_are_taken_for_whole_ones() -> None:
    with unchecked():
        domain = isgd.domain_sampler(same, dims=np.int64(2), batch_size=np.int8(100), num_boxes=np.int64(16))
    wanted = make(dims=2, batch_size=100)
    found = domain.sample(KEY, domain.init(), 1_000).points
    np.testing.assert_array_equal(found, wanted.sample(KEY, wanted.init(), 1_000).points)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_float64_scores_beyond_float32_count(size: float) -> None:
    """The largest counted as 0, so that the fewest points went where the scores were largest."""
    domain = make()
    with jax.enable_x64(True):
        found = domain.refresh(KEY, domain.init(), lambda x: x[:, 0].astype(jnp.float64) ** 2 * size)
    wanted = domain.refresh(KEY, domain.init(), lambda x: x[:, 0] ** 2)
    np.testing.assert_allclose(found.boxes.mass, wanted.boxes.mass, rtol=1e-4)
    assert int(found.unusable) == 0


def test_a_refresh_inside_what_is_differentiated_has_no_gradient_of_its_own() -> None:
    """It had NaN, the slope of a square root, where a box has no score."""
    domain = make()

    def mean(size: jax.Array) -> jax.Array:
        state = domain.refresh(KEY, domain.init(), lambda x: jnp.where(x[:, 0] > 0.5, size * x[:, 0], 0.0))
        draw = domain.sample(KEY, state, 0)
        return jnp.mean(draw.weights * size * draw.points[:, 0])

    value, slope = jax.value_and_grad(mean)(jnp.float32(1.0))
    assert float(slope) == pytest.approx(float(value), rel=1e-6)


@pytest.mark.parametrize("num_boxes", [2**13, 2**15])
def test_no_box_is_without_volume_where_scores_pile_up(num_boxes: int) -> None:
    """All points within 2^-20 of 0.9, the narrowest that float32 tells apart: sides came to 0, and densities to NaN."""
    offsets = isgd.quasi_random(KEY, boxes.POINTS_PER_BOX * num_boxes, 1) * 2.0**-20
    made = jax.jit(boxes.fitted)(0.9 + offsets, jnp.ones(len(offsets)), jnp.ones(len(offsets)), uniform_fraction=0.25)
    assert float(jnp.min(made.volume)) > 0.0
    assert bool(jnp.all(jnp.isfinite(boxes.densities(made, 0.9 + offsets))))


@pytest.mark.devices(8)
def test_a_state_split_over_an_explicit_mesh_is_that_of_one_device() -> None:
    domain, mesh = make(dims=2), jax.make_mesh((8,), ("data",))

    def laid(x: jax.Array) -> jax.Array:
        split = P("data") if x.ndim and x.shape[0] % 8 == 0 else P()
        return jax.device_put(x, NamedSharding(mesh, split))

    def run(state: isgd.DomainState) -> tuple[isgd.DomainState, jax.Array]:
        def step(state: isgd.DomainState, at: jax.Array) -> tuple[isgd.DomainState, jax.Array]:
            state = domain.refresh(KEY, state, peak)
            return state, domain.sample(KEY, state, at).points

        return jax.lax.scan(step, state, jnp.arange(3, dtype=jnp.int32))

    one, several = jax.jit(run)(domain.init()), jax.jit(run)(jax.tree.map(laid, domain.init()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, several)
    assert several[0].boxes.mass.sharding.spec == P("data")
