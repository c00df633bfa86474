"""Groups and costs against closed forms: what is estimated, how draws are shared out, and what they cost."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_problem import jitted, unchecked

import isgd_jax as isgd
from isgd_jax.sampling import costs as cost
from isgd_jax.sampling import fractions

N, M, KEYS = 12, 6, 3000
IDS = np.repeat([0, 1, 2], [6, 4, 2])
SIZES = np.array([6.0, 4.0, 2.0])
COSTS = np.linspace(1.0, 30.0, N)
SCORES = np.random.default_rng(0).lognormal(0.0, 1.0, N).astype(np.float32)


def _sampler(**options: Any) -> isgd.BatchSampler:
    return jitted(
        isgd.importance_sampler(N, **{"batch_size": M, "uniform_fraction": 0.2, "calibrate": False, **options})
    )


def _scored(sampler: isgd.BatchSampler, scores: np.ndarray = SCORES) -> Any:
    @jax.jit
    def scored(scores: jax.Array) -> Any:
        return sampler.refresh(sampler.record(sampler.init(), np.arange(len(scores)), scores, version=0))

    return scored(scores)


def _probs(state: Any) -> np.ndarray:
    return np.asarray(isgd.samplers.probabilities(state.proposal.law), np.float64)


def _per_group(values: np.ndarray) -> np.ndarray:
    return np.bincount(IDS, weights=values, minlength=3)


def _schedule(step: jax.Array) -> jax.Array:
    return jnp.where(step < 5, jnp.asarray([1.0, 3.0, 0.0]), jnp.asarray([0.0, 1.0, 1.0]))


CASES: dict[str, dict[str, Any]] = {
    "shares": {"groups": isgd.Groups(IDS, shares=[0.2, 0.3, 0.5])},
    "schedule and costs": {"groups": isgd.Groups(IDS, shares=_schedule), "costs": COSTS},
    "weights with signs": {"groups": isgd.Groups(IDS), "example_weights": np.linspace(-1, 2, N).astype(np.float32)},
    "costs": {"costs": COSTS},
}
TARGETS = {
    "shares": lambda step: (np.array([0.2, 0.3, 0.5]) / SIZES)[IDS],
    "schedule and costs": lambda step: (np.array([0.25, 0.75, 0.0] if step < 5 else [0.0, 0.5, 0.5]) / SIZES)[IDS],
    "weights with signs": lambda step: np.linspace(-1, 2, N),
    "costs": lambda step: np.full(N, 1.0 / N),
}


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_unbiased_for_the_target_of_its_step_after_late_records_too(name: str) -> None:
    # The mean of target/probs over 3000 draws, for each example: within 4.5 standard errors of its part of the target.
    sampler = _sampler(**CASES[name])
    state = _scored(sampler)
    sample = jax.jit(lambda keys, state, ahead: jax.vmap(lambda key: sampler.sample(key, state, ahead=ahead))(keys))
    late = sampler.record(state, np.arange(3), np.full(3, 50.0, np.float32), version=0)  # between two proposals
    for ahead, known in ((0, state), (1, late), (9, late)):  # 9 is after the schedule has turned
        made = sample(jax.random.split(jax.random.key(ahead), KEYS), known, jnp.int32(ahead))
        found, indices = np.zeros((KEYS, N)), np.asarray(made.indices)
        np.add.at(found, (np.arange(KEYS)[:, None], indices), np.asarray(made.target / made.probs) / M)
        wanted = TARGETS[name](ahead)
        np.testing.assert_allclose(made.target, wanted[indices], rtol=1e-5, atol=1e-8)
        error = found.std(axis=0, ddof=1) / np.sqrt(KEYS)
        assert np.all(np.abs(found.mean(axis=0) - wanted) <= 4.5 * error + 1e-6)
        assert np.all(_probs(known)[wanted != 0.0] > 0.0)


@pytest.mark.slow
def test_shares_change_the_target_and_leave_the_draws_of_a_proposal_alone() -> None:
    first, second = (isgd.Groups(IDS, shares=shares, allocation=[1, 1, 2]) for shares in ([1, 1, 1], [5, 1, 4]))
    draws = []
    for groups in (first, second):
        sampler = _sampler(groups=groups)
        draws.append(sampler.sample(jax.random.key(0), _scored(sampler)))
    np.testing.assert_array_equal(draws[0].indices, draws[1].indices)
    np.testing.assert_array_equal(draws[0].probs, draws[1].probs)
    assert not np.allclose(draws[0].target, draws[1].target)


@pytest.mark.slow
def test_allocations_are_what_they_say() -> None:
    fixed = _scored(_sampler(groups=isgd.Groups(IDS, shares=[1, 0, 1], allocation=[2, 0, 8])))
    np.testing.assert_allclose(_per_group(_probs(fixed)), [0.2, 0.0, 0.8], atol=1e-6)
    within = 0.8 * SCORES[:6] / SCORES[:6].sum() + 0.2 / 6
    np.testing.assert_allclose(_probs(fixed)[:6], 0.2 * within, rtol=1e-5)
    target = _scored(_sampler(groups=isgd.Groups(IDS, shares=[1, 6, 3], allocation="target")))
    np.testing.assert_allclose(_per_group(_probs(target)), [0.1, 0.6, 0.3], rtol=1e-5)
    floored = _scored(_sampler(groups=isgd.Groups(IDS, shares=[1, 6, 3], allocation="target", floors=[0.4, 0.0, 0.1])))
    np.testing.assert_allclose(_per_group(_probs(floored)), [0.4, 0.4, 0.2], rtol=1e-5)
    blank = _sampler(groups=isgd.Groups(IDS, shares=[1, 6, 3])).init()
    np.testing.assert_allclose(_probs(blank), (np.array([0.1, 0.6, 0.3]) / SIZES)[IDS], rtol=1e-5)
    plain = _sampler(groups=IDS).init()
    np.testing.assert_allclose(_probs(plain), 1.0 / N, rtol=1e-5)


def test_exact_scores_draw_as_the_least_variance_does_and_weights_are_bounded() -> None:
    unit = (np.array([0.2, 0.3, 0.5]) / SIZES)[IDS]
    state = _scored(_sampler(groups=isgd.Groups(IDS, shares=[0.2, 0.3, 0.5]), costs=COSTS, uniform_fraction=1e-4))
    best = unit * SCORES / np.sqrt(COSTS)
    np.testing.assert_allclose(_probs(state), best / best.sum(), rtol=2e-3)
    wrong = np.full(N, 1e-6, np.float32)
    wrong[0] = 1.0
    adverse = _scored(_sampler(groups=isgd.Groups(IDS, shares=[0.2, 0.3, 0.5])), wrong)
    assert np.max(unit / _probs(adverse)) <= 2.0 / 0.2**2


@pytest.mark.slow
def test_neyman_s_allocation_is_within_five_percent_of_the_least_variance() -> None:
    """Scores that know nothing, norms that differ between groups: the draws tell, and the closed form is the judge."""
    size, ids = 120, np.repeat([0, 1, 2, 3], [60, 30, 20, 10])
    norms = (np.array([1.0, 4.0, 0.5, 12.0])[ids] * np.random.default_rng(1).lognormal(0, 0.5, size)).astype(np.float32)
    costs = np.array([1.0, 8.0, 3.0, 2.0])[ids]
    shares, counts = np.array([0.4, 0.3, 0.2, 0.1]), np.bincount(ids)
    sampler = isgd.importance_sampler(
        size,
        batch_size=32,
        groups=isgd.Groups(ids, shares=shares),
        costs=costs,
        calibrate=False,
        record_drawn=False,
        uniform_fraction=0.05,
        monitor=False,
    )
    table = jnp.asarray(norms)

    def step(state: Any, key: Any) -> Any:
        draw = sampler.sample(key, state)
        return sampler.observe(state, draw, norms=table[draw.indices]), None

    @jax.jit
    def period(state: Any, key: Any) -> Any:
        return sampler.refresh(jax.lax.scan(step, state, jax.random.split(key, 150))[0])

    state = _scored(sampler, np.ones(size, np.float32))
    for at in range(3):
        state = period(state, jax.random.key(at))
    share, price = np.asarray(state.examples.groups.allocation), np.bincount(ids, weights=costs) / counts
    moment = shares**2 * np.bincount(ids, weights=norms.astype(float) ** 2) / counts  # uniform within a group
    reached = (moment / share).sum() * (share * price).sum()
    assert reached <= 1.05 * np.sqrt(moment * price).sum() ** 2
    proportional = (moment / shares).sum() * (shares * price).sum()
    assert reached < 0.7 * proportional
    report = sampler.report(state).groups
    np.testing.assert_allclose(report.target, shares, rtol=1e-5)
    np.testing.assert_allclose(report.allocation, share)
    np.testing.assert_allclose(report.second_moment, moment / share, rtol=0.15)
    np.testing.assert_allclose(report.drawn, share, atol=0.05)


def test_the_least_variance_per_cost_has_scores_over_the_root_of_costs() -> None:
    state = _scored(_sampler(costs=COSTS))
    best = SCORES / np.sqrt(COSTS)
    probs = 0.8 * best / best.sum() + 0.2 / N
    np.testing.assert_allclose(_probs(state), probs, rtol=1e-5)
    assert float(state.examples.costs.uniform) == pytest.approx(COSTS.mean(), rel=1e-6)
    assert float(state.examples.costs.proposed) == pytest.approx(probs @ COSTS, rel=1e-5)
    found = cost.of_fractions(state.examples.costs, jnp.float32(0.2), jnp.asarray([0.0, 0.2, 0.6]))
    exact = [((1 - x) * best / best.sum() + x / N) @ COSTS / COSTS.mean() for x in (0.0, 0.2, 0.6)]
    np.testing.assert_allclose(found, exact, rtol=1e-4)


@pytest.mark.slow
def test_the_uniform_fraction_is_chosen_by_moment_times_cost() -> None:
    """Where uniform draws are ten times as dear, what they save must be worth it."""
    known = fractions.create()
    norms, relative, mask = jnp.asarray([1.0, 1.3]), jnp.asarray([0.3, 1.7]), jnp.ones(2, bool)
    dear = jnp.linspace(1.0, 10.0, len(fractions.GRID))
    chosen = []
    for costs in (None, dear):
        kept = known
        for _ in range(30):
            kept = fractions.observe(kept, jnp.ones(2), norms, relative, mask, costs=costs)
        chosen.append(float(fractions.choose(kept)))
    assert chosen[0] == pytest.approx(max(fractions.GRID))
    assert chosen[1] == pytest.approx(min(fractions.GRID))


@pytest.mark.slow
def test_the_gate_judges_moment_times_cost() -> None:
    """Fewer moments at a higher price: scores that are dear to follow are harm, though their moment is less."""
    scores = np.r_[np.ones(N - 2), 2.0, 2.0].astype(np.float32)
    costs = np.r_[np.ones(N - 2), 1.5, 1.5]
    verdicts = []
    for price in (None, costs):
        sampler = _sampler(costs=price, record_drawn=False, sampler="independent")
        state = _scored(sampler, scores)
        if price is not None:  # the proposal that costs do not know of
            dear = state.examples.costs._replace(proposed=2.0 * state.examples.costs.uniform)
            state = state._replace(examples=state.examples._replace(costs=dear))
        draw = sampler.sample(jax.random.key(0), state)
        state = sampler.observe(state, draw, norms=jnp.asarray(scores)[draw.indices])
        stale, uniform = np.asarray(state.gate.window.values[0])
        verdicts.append(stale / uniform)
    assert verdicts[0] < 1.0 < verdicts[1]


@pytest.mark.slow
def test_the_report_tells_variance_times_cost_and_groups() -> None:
    names = ("web", "books", "code")
    sampler = _sampler(costs=COSTS, groups=isgd.Groups(IDS, names=names))
    state = _scored(sampler)
    draw = sampler.sample(jax.random.key(0), state)
    for _ in range(2):
        state = sampler.observe(state, draw, {"w": jnp.asarray(SCORES)[draw.indices, None]})
    report = sampler.report(state)
    np.testing.assert_allclose(report.cost.drawn.value, report.variance.drawn.value * report.cost.cost, rtol=1e-6)
    np.testing.assert_allclose(report.cost.uniform.value, report.variance.uniform.value * COSTS.mean(), rtol=1e-5)
    assert float(report.cost.cost) == pytest.approx(_probs(state) @ COSTS, rel=1e-5)
    text = str(report)
    assert "variance times cost, drawn" in text
    assert all(name in text for name in names)
    blind = _sampler(costs=COSTS, monitor=False)
    assert "cost of a draw" in str(blind.report(blind.init()))


@pytest.mark.slow
def test_a_gate_opens_again_where_a_group_has_no_share() -> None:
    sampler = _sampler(groups=isgd.Groups(IDS, shares=[1, 1, 0]), monitor=False)
    state = _scored(sampler)
    state = state._replace(gate=state.gate._replace(is_open=jnp.asarray(False)))
    draw = sampler.sample(jax.random.key(0), state)
    assert 2 in IDS[np.asarray(draw.indices)]
    after = sampler.observe(state, draw, norms=jnp.ones(M))
    assert int(after.gate.window.seen) == 1
    for leaf in jax.tree.leaves(after):
        assert leaf.dtype != jnp.float32 or np.all(np.isfinite(leaf))


def test_shares_that_cannot_be_make_the_target_nan() -> None:
    sampler = _sampler(
        groups=isgd.Groups(IDS, shares=lambda step: jnp.asarray([1.0, 1.0, 1.0]) - step.astype(jnp.float32))
    )
    draw = sampler.sample(jax.random.key(0), sampler.init(), ahead=2)
    assert np.all(np.isnan(draw.target))
    assert np.all(np.asarray(draw.probs) > 0.0)


@pytest.mark.slow
def test_an_empty_group_changes_no_allocation_of_the_others() -> None:
    gaps = np.array([0, 2, 3])[IDS]
    shares = [_scored(_sampler(groups=ids, costs=COSTS)).examples.groups.allocation for ids in (IDS, gaps)]
    np.testing.assert_allclose(np.asarray(shares[1])[[0, 2, 3]], shares[0], rtol=1e-5)
    assert float(shares[1][1]) == 0.0


@pytest.mark.slow
def test_only_ratios_of_shares_count_however_large_or_small_they_are() -> None:
    for unit in (1e39, 1e-50):
        numbers = [unit, 2 * unit, 5 * unit]
        state = (sampler := _sampler(groups=isgd.Groups(IDS, shares=numbers, allocation=numbers))).init()
        np.testing.assert_allclose(state.examples.groups.allocation, [0.125, 0.25, 0.625], rtol=1e-5)
        draw = sampler.sample(jax.random.key(0), state)
        np.testing.assert_allclose(draw.target, draw.probs, rtol=1e-5)
    weightless = _sampler(groups=IDS, example_weights=np.zeros(N)).init()
    np.testing.assert_allclose(_probs(weightless), 1.0 / N, rtol=1e-5)
    told = _sampler(groups=isgd.Groups(IDS, shares=lambda step: [1, 2, 5])).init()  # a list is as good
    shares, even = np.array([0.125, 0.25, 0.625]), np.bincount(IDS) / N
    wanted = 0.8 * shares + 0.2 * 0.5 * (shares + even)  # the uniform fraction is half of it even, for shares to come
    np.testing.assert_allclose(told.examples.groups.allocation, wanted, rtol=1e-5)


@pytest.mark.slow
def test_a_norm_beyond_all_measure_is_not_held_against_a_group_for_ever() -> None:
    sampler = _sampler(groups=IDS, example_weights=np.full(N, 1e6, np.float32), monitor=False)
    state = sampler.init()
    draw = sampler.sample(jax.random.key(0), state)
    state = sampler.observe(state, draw, norms=jnp.full(M, 1e14))
    assert np.all(np.isfinite(state.examples.groups.moments))
    assert np.all(np.isfinite(_probs(sampler.refresh(state))))


@pytest.mark.slow
def test_a_report_outlives_its_state_and_goes_through_jit() -> None:
    options = {"groups": isgd.Groups(IDS, names=("web", "books", "code")), "costs": COSTS}
    sampler = isgd.importance_sampler(N, batch_size=M, **options)
    state = sampler.init()
    before, within = sampler.report(state), jax.jit(sampler.report)(state)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, within))
    jax.jit(lambda state: jax.tree.map(jnp.copy, state), donate_argnums=0)(state)
    assert "web" in str(before)


@pytest.mark.slow
def test_variance_times_cost_of_draws_with_padding_counts_what_is_drawn() -> None:
    # Of poisson some of the draws are padding, and cost nothing.
    size, costs = 8 * N, np.tile(COSTS, 8)
    sampler = jitted(isgd.importance_sampler(size, batch_size=size, sampler="poisson", costs=costs, gate=False))
    state = _scored(sampler, np.tile(SCORES, 8))
    keys = jax.random.split(jax.random.key(0), KEYS)
    made = jax.jit(jax.vmap(lambda key, state: sampler.sample(key, state, ahead=1), (0, None)))(keys, state)
    charged = np.where(made.mask, costs[np.asarray(made.indices)], 0.0).sum(axis=1) / size
    for step in range(2):  # the first in halves, so that variances are measured
        draw = sampler.sample(jax.random.key(step), state)
        state = sampler.observe(state, draw, {"w": jnp.asarray(np.tile(SCORES, 8))[draw.indices, None]})
    told = sampler.report(state)
    found = float(told.cost.drawn.value / told.variance.drawn.value)
    assert abs(found - charged.mean()) < 4.5 * charged.std() / np.sqrt(KEYS)
    assert found < float(told.cost.cost)


@pytest.mark.slow
def test_a_state_of_other_groups_weights_or_costs_is_refused() -> None:
    made = _sampler(groups=isgd.Groups(IDS, shares=[1, 1, 1]))
    for other, told in (
        (_sampler(), "without groups, this sampler with"),
        (_sampler(groups=IDS // 2), "of 2 groups, this sampler of 3"),
        (_sampler(groups=IDS, costs=COSTS), "with costs, this sampler without"),
    ):
        with pytest.raises(ValueError, match=told):
            made.sample(jax.random.key(0), other.init())


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"costs": COSTS[1:]}, ValueError, r"costs must have shape \(12,\), one number an example; got \(11,\)"),
        ({"costs": np.r_[0.0, COSTS[1:]]}, ValueError, "costs must be above 0 and finite as float32, got 0.0 at 0"),
        ({"groups": IDS[1:]}, ValueError, r"groups need one id an example, \[12\]; got shape \(11,\)"),
        ({"groups": IDS * 1.0}, TypeError, "the ids of groups must be whole numbers, got float64"),
        ({"groups": IDS - 1}, ValueError, "the ids of groups must be 0 to 1, got -1 to 1"),
        ({"groups": isgd.Groups(IDS, shares=[1, 1])}, ValueError, "the ids of groups must be 0 to 1, got 0 to 2"),
        (
            {"groups": isgd.Groups(IDS, shares=[1, 1, -1])},
            ValueError,
            "shares must be finite, 0 or more, and not all 0",
        ),
        ({"groups": isgd.Groups(IDS, shares=[1, 1, 1, 1])}, ValueError, "group 3 has a share and no example"),
        (
            {"groups": isgd.Groups(IDS, shares=lambda step: jnp.ones(4))},
            ValueError,
            "group 3 has no example: a schedule may give it a share",
        ),
        ({"groups": isgd.Groups(IDS, shares=[1, 1, 1]), "example_weights": SCORES}, ValueError, "give one; weights"),
        ({"groups": isgd.Groups(IDS, allocation=[1, 1, 0])}, ValueError, "group 2 is part of the target and has no"),
        ({"groups": (IDS, "best")}, ValueError, 'allocation must be "neyman", "target" or num'),
        ({"groups": isgd.Groups(IDS, floors=0.4)}, ValueError, "floors are least shares of the draws and sum to at"),
        ({"groups": isgd.Groups(IDS, floors=[1, 0, 0])}, ValueError, "sum to at most 0.99, got 1"),
        ({"groups": isgd.Groups(IDS, names=("a",))}, ValueError, "there are 3 groups, got 1 names"),
        ({"groups": IDS * 10}, ValueError, "ids of groups are 0 to 20 for 12 examples: number the groups"),
        ({"groups": np.ma.masked_equal(IDS, 1)}, TypeError, "groups must be an array without a mask"),
        ({"costs": np.ma.masked_less(COSTS, 5)}, TypeError, "costs must be an array without a mask"),
        ({"costs": COSTS.tolist()}, TypeError, "costs must be an array, np.asarray.*, got list"),
        ({"example_weights": COSTS.tolist()}, TypeError, "example_weights must be an array, np.asarray.*, got list"),
        (
            {"groups": isgd.Groups(IDS, shares=np.array(0.5))},
            ValueError,
            r"shares must have one number .* got shape \(\)",
        ),
        (
            {"groups": isgd.Groups(IDS, shares=np.array(["even"] * 3))},
            TypeError,
            "shares must be numbers, one for each of the 3 groups",
        ),
        ({"groups": isgd.Groups(IDS, shares=lambda step: step)}, ValueError, r"shares\(step\) must return one number"),
        (
            {"groups": isgd.Groups(IDS, allocation=[1, 1, 1e-46])},
            ValueError,
            "no share of the draws, or less than 1e-09",
        ),
        (
            {"groups": isgd.Groups(IDS, shares=_schedule), "uniform_fraction": 0.0, "additive": 1.0},
            ValueError,
            "uniform_fraction=0 with shares that are a function of the step",
        ),
        (
            {"groups": isgd.Groups(IDS, shares=[0, 1, 0]), "sampler": "without_replacement"},
            ValueError,
            "draws distinct examples: batch_size=6 of the 4 whose groups have a share",
        ),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], told: str) -> None:
    with unchecked():
        if isinstance(options.get("groups"), tuple):
            options = {"groups": isgd.Groups(options["groups"][0], allocation=options["groups"][1])}
        with pytest.raises(error, match=told):
            _sampler(**options)
