"""The importance sampler against oracles: exact expectations, brute force, and each guarantee by its name."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_problem as problem

import isgd_jax as isgd
from isgd_jax.errors import ArgumentError
from isgd_jax.sampling import calibration, fractions, renewal, samplers
from isgd_jax.sampling.state import SamplerState
from isgd_jax.variance import gate as gates

N, M, DRAWS = 10, 4, 4000
NAMES = ("stratified", "systematic", "independent", "without_replacement", "poisson")
SIGNS = np.linspace(-1.0, 2.0, N).astype(np.float32)


@functools.cache
def _cached(**options: Any) -> isgd.BatchSampler:
    given = {name: np.asarray(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return problem.jitted(isgd.importance_sampler(N, **{"batch_size": M} | given))


def _made(**options: Any) -> isgd.BatchSampler:
    """A sampler of N examples with its functions compiled; the same one for the same options."""
    return _cached(**{name: tuple(x) if isinstance(x, np.ndarray) else x for name, x in options.items()})


class OwnSketch:
    """Sketches that come with the gradients: their first numbers."""

    dims = 3

    def of_grads(self, grads: Any, /) -> jax.Array:
        return jax.tree.leaves(grads)[0][:, : self.dims]


OWN_SKETCH = OwnSketch()


def _scored(sampler: isgd.BatchSampler, *, sketched: bool = False) -> SamplerState:
    """A state with a proposal from stale scores, of which one is 0 and two are missing; two steps old."""
    rng = np.random.default_rng(2)
    ids, scores = np.arange(N - 2), np.r_[0.0, rng.lognormal(0.0, 1.5, N - 3)].astype(np.float32)
    sketches = rng.normal(size=(N - 2, OwnSketch.dims)).astype(np.float32) if sketched else None
    state = sampler.record(sampler.init(), ids, scores, version=0, sketches=sketches)
    return sampler.refresh(state._replace(clock=state.clock._replace(step=jnp.int32(2), version=jnp.int32(2))))


def _at(state: SamplerState, *, step: int, is_open: bool) -> SamplerState:
    moved = state.clock._replace(step=jnp.int32(step), version=jnp.int32(step))
    return state._replace(clock=moved, gate=state.gate._replace(is_open=jnp.asarray(is_open)))


def _counts(draws: Any) -> np.ndarray:
    """1/probs of what was drawn, over m, by example: [keys, N], each of mean 1 if ``probs`` are expected counts / m."""
    indices, probs, mask = (np.asarray(x) for x in (draws.indices, draws.probs, draws.mask))
    found = np.zeros((len(indices), N))
    weights = np.where(mask, 1.0 / (np.where(mask, probs, 1.0) * indices.shape[1]), 0.0)
    np.add.at(found, (np.arange(len(indices))[:, None], indices), weights)
    return found


def _assert_unbiased(draws: Any, label: Any) -> None:
    """Each example's mean within 4.5 standard errors of 1; some 300 of them are looked at, with fixed keys."""
    found = _counts(draws)
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert np.all(np.abs(found.mean(axis=0) - 1.0) <= 4.5 * error + 1e-5), (label, found.mean(axis=0), error)


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_is_unbiased_open_or_shut_whole_or_in_halves(name: str) -> None:
    size = N if name == "poisson" else M  # it draws few: a full room is to be once in a million
    sampler = _made(batch_size=size, sampler=name, example_weights=SIGNS, uniform_fraction=0.2)
    draw = jax.jit(jax.vmap(sampler.sample, (0, None)))
    keys, state = jax.random.split(jax.random.key(1), DRAWS), _scored(sampler)
    for step in (0, 1):
        for is_open in (True, False):
            made = draw(keys, _at(state, step=step, is_open=is_open))
            _assert_unbiased(made, (name, step, is_open))
            assert np.all(np.asarray(made.probs) > 0.0)
            np.testing.assert_array_equal(made.target, SIGNS[np.asarray(made.indices)])
            assert np.all(np.asarray(made.in_halves) == (step == 0))
            assert np.all(np.asarray(made.mask)) or (name == "poisson" and is_open)
    fresh = draw(keys[:1000], sampler.init())
    _assert_unbiased(fresh, (name, "nothing known"))


@pytest.mark.parametrize("order", ["labels", "index", "sketch"])
def test_the_estimate_is_unbiased_along_every_order(order: str) -> None:
    orders = {"labels": np.arange(N) % 3, "sketch": OWN_SKETCH}
    sampler = _made(order=orders.get(order, order), uniform_fraction=0.2)
    state = _scored(sampler, sketched=order == "sketch")
    line = state.proposal.law.order
    if order == "index":
        assert line is None
    else:
        assert sorted(np.asarray(line)) == list(range(N))
    if order == "labels":
        assert np.all(np.diff(np.asarray(line) % 3) >= 0)
    if order == "sketch":  # what was never sketched is a last stretch of the line
        assert set(np.asarray(line)[-2:]) == {N - 2, N - 1}
    draw = jax.jit(jax.vmap(sampler.sample, (0, None)))
    for step in (0, 1):
        made = draw(jax.random.split(jax.random.key(2), DRAWS), _at(state, step=step, is_open=True))
        _assert_unbiased(made, (order, step))


def test_without_any_sketch_the_line_runs_by_score() -> None:
    sampler = _made(order=OWN_SKETCH)
    state = _scored(sampler)
    probs = np.asarray(state.proposal.law.masses)
    assert np.all(np.diff(probs) >= 0)


@pytest.mark.slow
def test_probs_are_those_of_the_proposal_and_bounded_by_the_uniform_fraction() -> None:
    sampler = _made(uniform_fraction=0.25, calibrate=False)
    state = _scored(sampler)
    scores = np.asarray(state.table.scores, np.float64)
    known = np.asarray(state.table.versions) >= 0
    scores[~known] = scores[known].mean()
    exact = 0.75 * scores / scores.sum() + 0.25 / N
    np.testing.assert_allclose(isgd.samplers.probabilities(state.proposal.law), exact, rtol=1e-5)
    draw = sampler.sample(jax.random.key(0), state)
    np.testing.assert_allclose(draw.probs, exact[np.asarray(draw.indices)], rtol=1e-5)


def test_the_paper_s_additive_constant() -> None:
    sampler = _made(uniform_fraction=0.0, additive=2.0, calibrate=False)
    state = sampler.refresh(sampler.record(sampler.init(), np.arange(N), np.arange(N, dtype=np.float32), version=0))
    exact = (np.arange(N) + 2.0) / (np.arange(N) + 2.0).sum()
    np.testing.assert_allclose(isgd.samplers.probabilities(state.proposal.law), exact, rtol=1e-5)


def test_example_weights_draw_by_their_size_and_come_back_as_target() -> None:
    sampler = _made(example_weights=SIGNS, uniform_fraction=0.1, calibrate=False, gate=False)
    state = sampler.refresh(sampler.record(sampler.init(), np.arange(N), np.ones(N, np.float32), version=0))
    exact = 0.9 * np.abs(SIGNS) / np.abs(SIGNS).sum() + 0.1 / N
    np.testing.assert_allclose(isgd.samplers.probabilities(state.proposal.law), exact, rtol=1e-5)


@pytest.mark.slow
def test_sample_changes_nothing_and_ahead_is_the_draw_that_would_be_made_then() -> None:
    sampler = _made(steps_per_update=3)
    sample, observe = sampler.sample, sampler.observe
    state = first = _scored(sampler)
    key = jax.random.key(3)
    ahead = [sample(key, first, ahead=jnp.int32(at)) for at in range(9)]
    for early in ahead:
        draw = sample(key, state)
        assert not problem.unlike(draw, early, rtol=0.0)
        state = observe(state, draw)  # without gradients it only moves on
    assert [int(draw.version) for draw in ahead] == [(2 + at) // 3 for at in range(9)]
    assert [bool(draw.in_halves) for draw in ahead] == [(2 + at) % 4 == 0 for at in range(9)]
    assert not problem.unlike(first, state._replace(clock=first.clock), rtol=0.0)
    assert (int(state.clock.step), int(state.version)) == (11, 3)


@pytest.mark.parametrize("name", NAMES)
def test_one_key_serves_a_run(name: Any) -> None:
    """It is never consumed, and no step repeats the one before; even draws give each example its turn."""
    sampler, steps = _made(batch_size=2 * M if name == "poisson" else M, sampler=name, monitor=False), 40
    state = _at(sampler.init(), step=0, is_open=False)
    with jax.debug_key_reuse(True):
        key, made = jax.random.key(1), []
        for at in range(steps):
            made.append(sampler.sample(key, state, ahead=jnp.int32(at)))
    places = np.stack([np.where(draw.mask, draw.indices, -1) for draw in made])
    assert np.all(np.any(places[1:] != places[:-1], axis=1))
    if name in ("stratified", "systematic", "without_replacement"):
        counts = np.stack([(places == index).sum(axis=1) for index in range(N)], axis=1)
        off = np.abs(np.cumsum(counts, axis=0) - np.arange(1, steps + 1)[:, None] * M / N)
        assert off.max() < 2.5, "at every step, for each example"


def _gradients(indices: Any, vectors: np.ndarray) -> dict[str, jax.Array]:
    return {"w": jnp.asarray(vectors, jnp.float32)[np.asarray(indices)]}


@pytest.mark.slow
def test_without_a_monitor_nothing_is_drawn_in_halves_or_estimated_from_them() -> None:
    # Along the order the gradients are +1 and then -1: the halves of a stratified batch would have opposite means.
    vectors = np.where(np.arange(N) < N // 2, 1.0, -1.0)[:, None]
    watched, blind = (_made(order="index", monitor=on) for on in (True, False))
    key, found = jax.random.key(4), {}
    for sampler in (watched, blind):
        sample, observe, state = sampler.sample, sampler.observe, sampler.init()
        for at in range(400):
            draw = sample(jax.random.fold_in(key, at), state)
            state = observe(state, draw, _gradients(draw.indices, vectors))
            if sampler is blind:
                assert not bool(draw.in_halves)
                strata = np.asarray(draw.indices) * M // N
                assert np.all(np.abs(strata - np.arange(M)) <= 1), "one draw in each stratum, at every step"
        found[sampler is watched] = state
    assert found[False].monitor is None
    assert blind.report(found[False]).variance is None
    # With it, every fourth step is two independent halves: |mean gradient|^2 = 0 without bias. Each measurement is the
    # product of two independent means of 2 draws, of standard deviation at most 1/2.
    measured = found[True].monitor.squares
    assert int(measured.seen) == 100
    size = measured.values.shape[0]
    assert abs(float(measured.values.mean())) < 4.5 * 0.5 / np.sqrt(size)


def test_what_draws_teach_is_unbiased() -> None:
    """Calibration, uniform fraction, gate and monitor, each against its mean over all examples."""
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(N, 3)) * rng.lognormal(0.0, 0.7, N)[:, None]
    norms, mean = np.linalg.norm(vectors, axis=1), vectors.mean(axis=0)
    sampler = _made(uniform_fraction=0.3)
    state, sums = _scored(sampler), []
    table = jnp.asarray(vectors, jnp.float32)
    probs = np.asarray(isgd.samplers.probabilities(state.proposal.law), np.float64)

    def learnt(key: Any, state: SamplerState) -> SamplerState:
        draw = sampler.sample(key, state)
        return sampler.observe(state, draw, {"w": table[draw.indices]})

    def truth_of(step: int) -> dict[str, float]:
        known = np.asarray(state.table.versions) >= 0
        return {
            "calibration": (norms**2)[known].sum() / N * M,
            "stale": (norms**2 / probs).sum() / N**2,
            "uniform": (norms**2).mean(),
            "mean norm": norms.mean(),
            "square": mean @ mean if step == 0 else 0.0,
        }

    def told(after: SamplerState) -> dict[str, Any]:
        at = 0
        return {
            "calibration": jnp.sum(after.calibration.square),
            "stale": after.gate.window.values[at, 0],
            "uniform": after.gate.window.values[at, 1],
            "mean norm": after.monitor.steps.values[at, 2],
            "square": after.monitor.squares.values[at, 0],
        }

    run = jax.jit(jax.vmap(lambda key, state: told(learnt(key, state)), (0, None)))
    for step in (0, 1):
        for is_open in (True, False):
            found = run(jax.random.split(jax.random.key(6), DRAWS), _at(state, step=step, is_open=is_open))
            for name, truth in truth_of(step).items():
                values = np.asarray(found[name], np.float64)
                error = values.std(ddof=1) / np.sqrt(DRAWS)
                assert abs(values.mean() - truth) <= 4.5 * error + 1e-5 * abs(truth), (name, step, is_open)
                sums.append(name)
    assert len(sums) == 20


@pytest.mark.slow
def test_scores_are_judged_by_what_they_were_at_the_draw() -> None:
    sampler = _made()
    state = _scored(sampler)
    draw = sampler.sample(jax.random.key(0), _at(state, step=9, is_open=True))
    norms = jnp.arange(1.0, M + 1)
    after = sampler.observe(_at(state, step=9, is_open=True), draw, norms=norms)
    old, versions = state.table.scores[draw.indices], state.table.versions[draw.indices]
    weights = 1.0 / (N * draw.probs)
    by_hand = calibration.observe(calibration.create(), old, 9 - versions, norms, weights, versions >= 0)
    assert not problem.unlike(after.calibration, by_hand)
    known = np.unique(np.asarray(draw.indices))
    assert np.all(np.asarray(after.table.versions)[known] == 9)


@pytest.mark.slow
def test_norms_alone_teach_all_but_the_mean_gradient_and_with_halves_that_too() -> None:
    sampler = problem.jitted(isgd.importance_sampler(problem.NUM_EXAMPLES, batch_size=4))
    own, examples, states = problem.params(), problem.data(), {}
    for how in ("lazy", "stacked", "norms", "halves"):
        gradients = isgd.stacked_per_example_grads if how == "stacked" else isgd.per_example_grads

        def step(state: SamplerState, key: Any, gradients: Any = gradients, how: str = how) -> SamplerState:
            draw = sampler.sample(key, state)
            batch = jax.tree.map(lambda x: x[draw.indices], examples)
            if how == "halves":
                asked = isgd.value_norms_and_mean(problem.loss_fn, halves=True, microbatch_size=2)
                _, norms, halves = asked(own, batch, draw.target / draw.probs)
                return sampler.observe(state, draw, norms=norms, halves=halves)
            grads = gradients(problem.loss_fn)(own, batch)
            if how == "norms":
                return sampler.observe(state, draw, norms=isgd.norms(grads))
            return sampler.observe(state, draw, grads)

        step, refresh, state = jax.jit(step), sampler.refresh, sampler.init()
        for at in range(12):
            state = step(refresh(state) if at % 4 == 0 else state, jax.random.key(at))
        states[how] = state
    assert not problem.unlike(states["lazy"]._replace(fractions=None), states["stacked"]._replace(fractions=None))
    assert not problem.unlike(states["lazy"]._replace(fractions=None), states["halves"]._replace(fractions=None))
    for other in ("stacked", "norms", "halves"):  # differences of moments: small beside what they are differences of
        assert not problem.unlike(states["lazy"].fractions, states[other].fractions, rtol=1e-4)
    blind = {"monitor": None, "fractions": None}
    assert not problem.unlike(states["lazy"]._replace(**blind), states["norms"]._replace(**blind))
    assert not problem.unlike(states["lazy"].monitor.steps, states["norms"].monitor.steps)
    assert int(states["lazy"].monitor.squares.seen) == 3
    assert int(states["norms"].monitor.squares.seen) == 0
    report = sampler.report(states["norms"])
    assert int(report.num_measured) == 0
    assert "second moments" in str(report)
    assert "second moments" not in str(sampler.report(states["lazy"]))
    norms_sq = jnp.mean(states["norms"].monitor.steps.values[:12, 0])
    np.testing.assert_allclose(report.variance.uniform.value, norms_sq, rtol=1e-5)


def test_halves_are_of_a_whole_draw_and_stand_beside_norms() -> None:
    sampler, halves = _made(), (jnp.ones(2), jnp.ones(2))
    state = sampler.init()
    draw = sampler.sample(jax.random.key(0), state)
    for given in ({}, {"grads": jnp.ones((M, 2)), "norms": jnp.ones(M)}):
        with pytest.raises(ArgumentError, match="beside norms="):
            sampler.observe(state, draw, halves=halves, **given)
    with pytest.raises(ArgumentError, match="axis_name= give observe"):
        sampler.observe(state, draw, norms=jnp.ones(M), halves=halves, axis_name="devices")


def test_scores_go_into_the_table_in_place_of_norms() -> None:
    sampler = _made()
    state = _scored(sampler)
    draw = sampler.sample(jax.random.key(0), state)
    norms, losses = jnp.full(M, 2.0), draw.indices.astype(jnp.float32) + 1.0
    after, plain = (sampler.observe(state, draw, norms=norms, **more) for more in ({"scores": losses}, {}))
    np.testing.assert_array_equal(after.table.scores[draw.indices], losses)
    assert not problem.unlike(after._replace(table=plain.table), plain)
    only = sampler.observe(state, draw, scores=losses)
    assert not problem.unlike(only.table, after.table)
    assert not problem.unlike(only.monitor, state.monitor)


def test_record_drawn_false_leaves_the_table_alone() -> None:
    sampler = _made(record_drawn=False)
    state = _scored(sampler)
    after = sampler.observe(state, sampler.sample(jax.random.key(0), state), norms=jnp.ones(M))
    assert not problem.unlike(after.table, state.table, rtol=0.0)
    assert float(jnp.sum(after.calibration.weight)) > 0.0


@pytest.mark.slow
def test_record_leaves_out_padding_counts_what_is_no_score_and_drops_what_is_older() -> None:
    sampler = _made()
    state = sampler.record(sampler.init(), np.array([0, 1]), np.array([5.0, 6.0], np.float32), version=3)
    bad = np.array([np.nan, np.inf, -1.0, np.nan, 7.0, 8.0, 9.0], np.float32)
    after = sampler.record(state, np.array([0, 2, 3, N, -1, 1, 4]), bad, version=2)
    assert int(after.quarantined) == 3, "neither padding nor old scores are counted"
    np.testing.assert_array_equal(after.table.scores, [5, 6, 0, 0, 9, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(after.table.versions, [3, 3, -1, -1, 2, -1, -1, -1, -1, -1])
    assert "3 were not finite" in str(sampler.report(after))


def _in_three_ways(sampler: Any, sketch: Any, state: Any, draw: Any, own: Any, batch: Any) -> list[SamplerState]:
    """From lazy gradients, from stacked ones, and from norms and sketches that are recorded."""
    grads = isgd.per_example_grads(problem.loss_fn)(own, batch)
    return [
        sampler.observe(state, draw, grads),
        sampler.observe(state, draw, isgd.stacked_per_example_grads(problem.loss_fn)(own, batch)),
        sampler.record(state, draw.indices, isgd.norms(grads), version=0, sketches=sketch.of_batch(own, batch)),
    ]


@pytest.mark.slow
def test_sketches_that_are_recorded_are_those_that_observe_makes() -> None:
    sketch = problem.sketch()
    sampler = problem.jitted(isgd.importance_sampler(problem.NUM_EXAMPLES, batch_size=6, order=sketch))
    state, own, examples = sampler.init(), problem.params(), problem.data()
    draw = sampler.sample(jax.random.key(0), state)
    batch = jax.tree.map(lambda x: x[draw.indices], examples)
    observed = jax.jit(functools.partial(_in_three_ways, sampler, sketch))(state, draw, own, batch)
    for other in observed[1:]:
        assert not problem.unlike(observed[0].ordering, other.ordering, rtol=1e-5)
    assert int(observed[0].ordering.is_sketched.sum()) == len(set(np.asarray(draw.indices).tolist()))


@pytest.mark.slow
def test_a_sketch_that_is_not_finite_is_not_written_nor_one_of_an_older_version() -> None:
    sampler = _made(order=OWN_SKETCH)
    ids, ones = np.arange(3), np.ones(3, np.float32)
    rows = np.ones((3, OwnSketch.dims), np.float32)
    state = sampler.record(sampler.init(), ids[:1], ones[:1], version=5, sketches=2 * rows[:1])
    rows[1, 1] = np.nan
    after = sampler.record(state, ids, ones, version=4, sketches=rows)
    np.testing.assert_array_equal(after.ordering.is_sketched[:4], [True, False, True, False])
    np.testing.assert_array_equal(after.ordering.sketches[:3, 0], [2.0, 0.0, 1.0])


def test_scores_older_than_max_age_count_as_the_mean_of_those_trusted() -> None:
    sampler = _made(max_age=3, uniform_fraction=0.1, calibrate=False)
    half = N // 2
    state = sampler.record(sampler.init(), np.arange(half), np.full(half, 9.0, np.float32), version=0)
    fresh = np.arange(1.0, half + 1).astype(np.float32)
    state = sampler.record(state, np.arange(half, N), fresh, version=1)
    state = sampler.refresh(state._replace(clock=state.clock._replace(version=jnp.int32(4))))
    wanted = np.r_[np.full(half, fresh.mean()), fresh]
    exact = 0.9 * wanted / wanted.sum() + 0.1 / N
    np.testing.assert_allclose(isgd.samplers.probabilities(state.proposal.law), exact, rtol=1e-5)
    assert float(state.proposal.trusted_share) == pytest.approx(0.5)


def test_scores_are_distrusted_by_the_clock_that_the_caller_reads() -> None:
    sampler = _made(max_age_seconds=10.0, calibrate=False)
    ones = np.ones(N // 2, np.float32)
    state = sampler.record(sampler.init(), np.arange(N // 2), ones, version=0, seconds=1.0)
    state = sampler.record(state, np.arange(N // 2, N), ones, version=0, seconds=9.0)
    draw = sampler.sample(jax.random.key(0), state)
    state = sampler.observe(state, draw, seconds=jnp.float32(15.0))
    assert float(sampler.refresh(state).proposal.trusted_share) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="pass seconds= to observe and record"):
        sampler.observe(state, draw)
    with pytest.raises(ValueError, match="pass seconds= to observe and record"):
        sampler.record(state, np.arange(2), ones[:2], version=0)


def test_a_clock_that_float32_cannot_tell_ages_by_is_refused_where_it_is_seen() -> None:
    sampler, now = isgd.importance_sampler(N, batch_size=M, max_age_seconds=30.0), 1_700_000_000.0
    state, told = sampler.init(), "got 1.7e.09, where it has steps of 128 s: count from the start of the run"
    draw = sampler.sample(jax.random.key(0), state)
    for seconds in (now, np.float64(now), jnp.float32(now)):
        with pytest.raises(ValueError, match=told):
            sampler.observe(state, draw, seconds=seconds)
    with pytest.raises(ValueError, match=told):
        sampler.record(state, np.arange(2), np.ones(2), version=0, seconds=now)
    with pytest.raises(ValueError, match=told):
        isgd.refresher(None, sampler, clock=lambda: now)(0, None, state)
    draws = isgd.loaders.index_sampler(sampler, key=jax.random.key(0))
    batch = next(draws)
    with pytest.raises(ValueError, match=told):
        draws.observe(batch, norms=np.ones(M), seconds=now)
    with pytest.raises(ValueError, match=told):
        draws.record([0], [1.0], seconds=now)
    draws.observe(batch, norms=np.ones(M), seconds=1e6)  # twelve days of running
    isgd.importance_sampler(N, batch_size=M).observe(state, draw, seconds=now)  # nothing ages by it


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint32])
def test_ids_that_int32_would_wrap_around_are_padding(dtype: Any) -> None:
    sampler = isgd.importance_sampler(N, batch_size=M)
    far = [2**32 + 5, 2**31 + 3, N] if dtype != np.uint32 else [2**31 + 3, 2**32 - 1, N]
    state = sampler.record(sampler.init(), np.array([*far, 2], dtype), np.full(4, 9.0, np.float32), version=0)
    np.testing.assert_array_equal(np.flatnonzero(state.table.scores), [2])
    assert int(state.quarantined) == 0


def test_draws_are_uniform_while_fewer_than_min_trusted_scores_are_trusted() -> None:
    for share, is_uniform in ((0.3, False), (0.5, True)):
        sampler = _made(min_trusted=share)
        state = sampler.record(sampler.init(), np.arange(4), np.arange(1.0, 5).astype(np.float32), version=0)
        made = sampler.refresh(state).proposal
        assert bool(made.is_uniform) == is_uniform
        probs = np.asarray(isgd.samplers.probabilities(made.law))
        assert np.allclose(probs, 1.0 / N) == is_uniform


def test_score_memory_keeps_a_share_of_the_old_mean_square() -> None:
    sampler = _made(score_memory=0.75)
    state = sampler.record(sampler.init(), np.array([3]), np.array([4.0], np.float32), version=0)
    state = sampler.record(state, np.array([3]), np.array([2.0], np.float32), version=1)
    assert float(state.table.scores[3]) == pytest.approx(np.sqrt(0.75 * 16.0 + 0.25 * 4.0), rel=1e-6)


@pytest.mark.slow
def test_calibrated_scores_are_used_after_the_learning_period_and_not_before() -> None:
    learner = _made(learning_steps=5, gate=False)
    state = _scored(learner)
    draw = learner.sample(jax.random.key(0), state)
    for _ in range(2):
        state = learner.observe(state, draw, norms=jnp.ones(M))
    before = learner.refresh(state)
    raw = _made(calibrate=False, gate=False)
    assert not problem.unlike(before.proposal.law, raw.refresh(state._replace(calibration=None)).proposal.law)
    later = state._replace(clock=state.clock._replace(version=jnp.int32(5)))
    found = learner.refresh(later)
    horizon = (5 - int(state.proposal.version)) // 2
    believed = calibration.predict(state.calibration, state.table.scores, 5 - state.table.versions + horizon)
    exact = isgd.proposal.propose(
        state.table._replace(scores=believed), version=5, mixture=fractions.choose(state.fractions)
    )
    np.testing.assert_allclose(isgd.samplers.probabilities(found.proposal.law), exact.probs, rtol=1e-5)
    assert problem.unlike(found.proposal.law, before.proposal.law, rtol=1e-3)


def test_by_default_the_learning_period_is_two_refreshes() -> None:
    sampler = _made()
    assert renewal.LEARNING_REFRESHES == 2
    state = _scored(sampler)  # one refresh
    draw = sampler.sample(jax.random.key(0), state)
    state = sampler.observe(state, draw, norms=jnp.full(M, 3.0))
    raw = _made(calibrate=False)
    second = sampler.refresh(state)
    assert not problem.unlike(second.proposal.law, raw.refresh(state._replace(calibration=None)).proposal.law)
    third = sampler.refresh(second)
    assert problem.unlike(third.proposal.law, second.proposal.law, rtol=1e-3)


@pytest.mark.slow
def test_the_gate_shuts_where_scores_do_harm_and_opens_again() -> None:
    sampler = _made(calibrate=False, uniform_fraction=0.05, record_drawn=False)
    scores = np.geomspace(1e-3, 1e3, N).astype(np.float32)
    harmful, helpful = jnp.asarray(scores[::-1].copy()), jnp.asarray(scores)
    sample, observe = sampler.sample, sampler.observe
    state = sampler.refresh(sampler.record(sampler.init(), np.arange(N), scores, version=0))
    moves = [bool(state.gate.is_open)]
    for norms in (harmful, helpful):
        for _ in range(150):
            draw = sample(jax.random.key(int(state.clock.step)), state)
            state = observe(state, draw, norms=norms[draw.indices])
        moves.append(bool(state.gate.is_open))
        if not moves[-1]:
            draw = sample(jax.random.key(0), state)
            np.testing.assert_allclose(draw.probs, 1.0 / N)
            assert float(sampler.report(state).top_share) == pytest.approx(1.0 / N), (
                "of one example, the least there is"
            )
            assert "shut" in str(sampler.report(state))
    assert moves == [True, False, True]
    assert isinstance(state.gate, gates.Gate)


@pytest.mark.slow
def test_the_uniform_fraction_is_learnt_and_used_at_the_next_refresh() -> None:
    sampler = _made(calibrate=False, gate=False, monitor=False)
    scores = jnp.geomspace(1.0, 100.0, N)
    sample, observe, refresh = sampler.sample, sampler.observe, sampler.refresh
    state = refresh(sampler.record(sampler.init(), np.arange(N), scores, version=0))
    assert float(state.proposal.uniform_fraction) == pytest.approx(fractions.CAUTIOUS)
    for at in range(60):  # the scores are exact: the least fraction is the best
        draw = sample(jax.random.key(at), state)
        state = observe(state, draw, norms=scores[draw.indices])
    assert float(refresh(state).proposal.uniform_fraction) == pytest.approx(min(fractions.GRID))


def test_an_order_is_kept_for_order_every_refreshes() -> None:
    sampler = _made(order_every=3)
    refresh, rng, state, lines = sampler.refresh, np.random.default_rng(0), sampler.init(), []
    for at in range(7):
        scores = rng.permutation(N).astype(np.float32)
        state = refresh(sampler.record(state, np.arange(N), scores, version=at))
        lines.append(tuple(np.asarray(state.proposal.law.order).tolist()))
        probs = np.asarray(isgd.samplers.probabilities(state.proposal.law))
        np.testing.assert_array_equal(np.argsort(probs), np.argsort(scores))
    assert lines[0] == lines[1] == lines[2] != lines[3]
    assert lines[3] == lines[4] == lines[5] != lines[6]


@pytest.mark.slow
def test_a_key_of_refresh_starts_the_clusters_and_the_default_comes_from_seed_and_version() -> None:
    sampler = _made(order=OWN_SKETCH)
    state = _scored(sampler, sketched=True)
    refresh = sampler.refresh
    lines = [tuple(np.asarray(refresh(state, jax.random.key(at)).proposal.law.order).tolist()) for at in range(8)]
    assert len(set(lines)) > 1
    assert not problem.unlike(refresh(state), refresh(state), rtol=0.0)


@pytest.mark.parametrize("given", ["poisson", samplers.poisson])
def test_the_monitor_of_poisson_tells_what_its_draws_are_worth(given: Any) -> None:
    """STALE is of one draw by the law, whole steps and halves have one variance, and DRAWN is it: by brute force."""
    size, room, keys = 200, 32, jax.random.split(jax.random.key(3), 4000)
    rng = np.random.default_rng(0)
    grads = (rng.normal(size=(size, 3)) * rng.lognormal(0, 0.5, (size, 1)) + 0.5).astype(np.float32)
    norms = np.linalg.norm(grads, axis=1)
    sampler = isgd.importance_sampler(size, batch_size=room, sampler=given, gate=False, calibrate=False)
    fresh = sampler.init()
    scored = sampler.refresh(sampler.record(fresh, np.arange(size), norms**1.5, version=0))

    def told(key: Any, state: Any, ahead: Any) -> Any:
        state = state._replace(clock=state.clock._replace(step=state.clock.step + ahead))
        draw = sampler.sample(key, state)
        watched = sampler.observe(state, draw, {"w": jnp.asarray(grads)[draw.indices]}).monitor
        weights = jnp.where(draw.mask, draw.target / jnp.where(draw.mask, draw.probs, 1.0), 0.0)
        made = jnp.mean(weights[:, None] * jnp.asarray(grads)[draw.indices], axis=0)
        return made, watched.steps.values[0, :2], watched.batches.values[0, 0], watched.squares.values[0, 0]

    many = jax.jit(jax.vmap(told, (0, None, None)))
    for state in (fresh, scored):
        law = np.asarray(isgd.samplers.probabilities(state.proposal.law), np.float64)
        (halves, moments, drawn, square), (whole, *_) = many(keys, state, 0), many(keys, state, 1)
        parts = [room * np.trace(np.cov(np.asarray(made, np.float64).T)) for made in (halves, whole)]
        assert 0.93 < parts[0] / parts[1] < 1.12
        truths = {
            "uniform": (moments[:, 0], np.mean(norms**2)),
            "stale": (moments[:, 1], np.sum(norms**2 / law) / size**2),
            "drawn": (drawn, parts[0]),
            "square": (square, np.sum(np.square(grads.mean(axis=0)))),
        }
        for name, (values, truth) in truths.items():
            values = np.asarray(values, np.float64)
            allowed = 4.5 * values.std() / np.sqrt(len(keys)) + (0.05 * truth if name == "drawn" else 0.0)
            assert abs(values.mean() - truth) < allowed, name
        if state is fresh:  # a draw is a uniform one
            np.testing.assert_allclose(moments[:, 1], moments[:, 0], rtol=1e-5)


@pytest.mark.slow
def test_poisson_learns_from_the_draws_that_are_there_alone() -> None:
    sampler = _made(batch_size=N, sampler="poisson")
    state = _at(_scored(sampler), step=1, is_open=True)
    sample = sampler.sample
    draw = next(d for d in (sample(jax.random.key(at), state) for at in range(50)) if not bool(jnp.all(d.mask)))
    norms = jnp.where(draw.mask, 2.0, jnp.nan)
    after = sampler.observe(state, draw, norms=norms)
    assert int(after.quarantined) == 0
    for leaf in jax.tree.leaves(after):
        assert leaf.dtype != jnp.float32 or np.all(np.isfinite(leaf))
    left_out = np.setdiff1d(np.asarray(draw.indices)[~np.asarray(draw.mask)], np.asarray(draw.indices)[draw.mask])
    np.testing.assert_array_equal(after.table.scores[left_out], state.table.scores[left_out])


def test_a_batch_of_one_is_neither_halved_nor_monitored_and_unbiased() -> None:
    sampler = _made(batch_size=1)
    state = sampler.init()
    draw = sampler.sample(jax.random.key(0), state)
    assert not bool(draw.in_halves)
    after = sampler.observe(state, draw, norms=jnp.ones(1))
    assert int(after.version) == 1
    str(sampler.report(after))
