"""Every sampler in the user's own loop, in every mode of JAX that such loops are run in."""

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_problem as problem
from jax import lax

import isgd_jax as isgd
from isgd_jax.sampling.state import SamplerState

KINDS = problem.KINDS
OWN = ("stratified", "without_replacement", "poisson", "presampling")
"""What the others are made of: an order that is sorted, clusters of sketches, masked draws, scores within a step."""
DTYPES = {jnp.dtype(name) for name in ("int32", "uint32", "float32", "bool")}


def _all_finite(state: SamplerState) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert leaf.dtype in DTYPES, jax.tree_util.keystr(path)
        if leaf.dtype == jnp.float32:
            assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_donated_whole_from_init_on_it_learns_and_compiles_once(kind: str) -> None:
    ran = problem.train(kind)
    assert problem.full_loss(ran.params) < problem.full_loss(problem.params())
    assert int(ran.state.version) == 24
    _all_finite(ran.state)
    assert all(len(line) <= 100 for line in str(problem.samplers()[kind].report(ran.state)).splitlines())


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_leaves_share_a_buffer_after_init_and_refresh(kind: str) -> None:
    first = problem.samplers()[kind].init()
    _unshared(first)
    _unshared(problem.programs(kind)[1](first))


def _unshared(state: SamplerState) -> None:
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)


WIDE = (*OWN, "systematic", "independent", "epochs")
"""Run under x64; of the others types alone are asked."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [name for name in problem.NAMES if name not in WIDE])
def test_dtypes_of_the_state_are_the_same_under_x64(kind: str) -> None:
    sampler = problem.samplers()[kind]
    narrow = jax.eval_shape(sampler.init)
    with jax.enable_x64(True):
        own, examples = problem.params(), problem.data()
        state = jax.eval_shape(sampler.init)
        step = problem.make_step(sampler, problem.optimizer())
        after = jax.eval_shape(step, own, problem.optimizer().init(own), state, examples, jax.random.key(0))[2]
        fresh = jax.eval_shape(sampler.refresh, after)
        told = jax.eval_shape(sampler.report, fresh)
    assert narrow == state == after == fresh
    assert {leaf.dtype for leaf in jax.tree.leaves((state, told))} <= DTYPES


@pytest.mark.slow
@pytest.mark.parametrize("kind", WIDE)
def test_types_and_numbers_of_the_state_are_the_same_under_x64(kind: str) -> None:
    sampler = problem.samplers()[kind]
    narrow = problem.train(kind)
    with jax.enable_x64(True):
        first, wide = sampler.init(), problem.train(kind)
        told = jax.eval_shape(sampler.report, wide.state)
        _all_finite(wide.state)
    types = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in (narrow.state, first, wide.state)]
    assert types[0] == types[1] == types[2]
    assert {leaf.dtype for leaf in jax.tree.leaves((wide.state, told))} <= DTYPES
    assert np.array_equal(narrow.indices, wide.indices)
    assert not problem.unlike(narrow.state, wide.state)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OWN)
def test_float64_parameters_beside_the_float32_state(kind: str) -> None:
    with jax.enable_x64(True):
        ran = problem.train(kind, begin=(problem.params(jnp.float64), problem.samplers()[kind].init()))
        assert {x.dtype for x in jax.tree.leaves(ran.params)} == {jnp.dtype("float64")}
        _all_finite(ran.state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["epochs", *(pytest.param(k, marks=pytest.mark.slow) for k in ("stratified", "without_replacement"))]
)
def test_bfloat16_parameters_beside_the_float32_state(kind: str) -> None:
    sampler = problem.samplers()[kind]
    ran = problem.train(kind, begin=(problem.params(jnp.bfloat16), sampler.init()))
    assert {x.dtype for x in jax.tree.leaves(ran.params)} == {jnp.dtype("bfloat16")}
    _all_finite(ran.state)
    assert problem.full_loss(ran.params) < problem.full_loss(problem.params())
    if kind == "epochs":  # the same batches as in float32, and the numbers to the precision of bfloat16
        found, exact = (sampler.report(state).variance for state in (ran.state, problem.train(kind).state))
        np.testing.assert_allclose(found.uniform.value, exact.uniform.value, rtol=0.1)
        np.testing.assert_allclose(found.mean_grad_norm_sq.value, exact.mean_grad_norm_sq.value, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_ever_nan(kind: str) -> None:
    sampler = problem.samplers()[kind]
    with jax.debug_nans(True):
        ran = problem.train(kind, steps=10)
        str(sampler.report(ran.state))
        str(sampler.report(sampler.init()))
    _all_finite(ran.state)


@pytest.mark.slow
def test_nothing_is_nan_where_all_gradients_are_zero() -> None:
    sampler = problem.samplers()["without_replacement"]
    with jax.debug_nans(True):
        state = sampler.init()
        observe, refresh = jax.jit(sampler.observe), jax.jit(sampler.refresh)
        for at in range(6):
            draw = jax.jit(sampler.sample)(jax.random.key(at), state)
            zeros = jax.tree.map(lambda x: jnp.zeros((problem.BATCH, *x.shape)), problem.params())
            state = refresh(observe(state, draw, zeros))
        assert bool(state.proposal.is_uniform)
        _all_finite(state)
        str(sampler.report(state))


@pytest.mark.slow
def test_an_exploded_step_leaves_the_state_finite_and_every_example_drawable() -> None:
    n, m = problem.NUM_EXAMPLES, problem.BATCH
    sampler = isgd.importance_sampler(n, batch_size=m, learning_steps=0)
    observe, refresh, sample = jax.jit(sampler.observe), jax.jit(sampler.refresh), jax.jit(sampler.sample)
    for huge in (1e10, 1e16, 1e30, np.inf, np.nan):
        state = sampler.init()
        for at in range(30):
            draw = sample(jax.random.key(at), state)
            state = observe(state, draw, norms=jnp.full(m, huge if at == 5 else 1.0, jnp.float32))
            if at % 6 == 5:
                state = refresh(state)
                _all_finite(state)
                probs = np.asarray(isgd.samplers.probabilities(state.proposal.law))
                assert np.all(probs > 0)
                np.testing.assert_allclose(np.sum(probs), 1.0, rtol=1e-4)
        assert int(state.quarantined) == (0 if np.isfinite(huge) else m)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_moves_nothing_between_host_and_device(kind: str) -> None:
    (step, refresh), tx = problem.programs(kind), problem.optimizer()
    own, state, examples = problem.params(), problem.samplers()[kind].init(), problem.data()
    opt_state, keys = tx.init(own), list(jax.random.split(jax.random.key(0), 6))
    with jax.transfer_guard("disallow"):
        for at, key in enumerate(keys):
            state = refresh(state) if at % 3 == 0 else state
            own, opt_state, state, _ = step(own, opt_state, state, examples, key)
    assert int(state.version) == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks_from_a_trace(kind: str) -> None:
    sampler, own, tx = problem.samplers()[kind], problem.params(), problem.optimizer()
    with jax.checking_leaks():
        state = jax.eval_shape(sampler.refresh, jax.eval_shape(sampler.init))
        step = problem.make_step(sampler, tx)
        jax.eval_shape(step, own, tx.init(own), state, problem.data(), jax.random.key(0))


@pytest.mark.parametrize("kind", ["epochs", *(pytest.param(k, marks=pytest.mark.slow) for k in OWN)])
def test_scan_over_steps_with_refresh_in_cond_is_the_loop(kind: str) -> None:
    sampler, tx = problem.samplers()[kind], problem.optimizer()
    step, key = problem.make_step(sampler, tx), jax.random.key(3)

    def body(carry: Any, at: jax.Array) -> Any:
        own, opt_state, state, examples = carry
        state = lax.cond(at % 8 == 0, sampler.refresh, lambda state: state, state)
        own, opt_state, state, told = step(own, opt_state, state, examples, jax.random.fold_in(key, at))
        return (own, opt_state, state, examples), told

    own = problem.params()
    carry = (own, tx.init(own), sampler.init(), problem.data())
    scanned = jax.jit(lambda carry: lax.scan(body, carry, jnp.arange(24, dtype=jnp.int32)))
    (_, _, state, _), indices = scanned(carry)
    looped = problem.train(kind)
    assert np.array_equal(indices, looped.indices)
    assert not problem.unlike(looped.state, state, rtol=3e-5)  # two programs round sums of squares otherwise


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_init_inside_jit_is_init(kind: str) -> None:
    init, key = problem.samplers()[kind].init, (jax.random.key(5),) if kind in problem.QUICK else ()
    assert not problem.unlike(init(*key), jax.jit(init)(*key))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_state_has_one_shape_whatever_keys_there_are(impl: str) -> None:
    init = isgd.shuffled_epochs(12, batch_size=4).init
    threefry = init(jax.random.key(7))
    state = init(jax.random.key(7, impl=impl))
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, threefry)
    assert not np.array_equal(state.key_data, init(jax.random.key(8, impl=impl)).key_data)
    with jax.default_prng_impl(impl):
        assert not problem.unlike(init(jax.random.key(7, impl="threefry2x32")), threefry)
    assert not problem.unlike(init(jax.random.PRNGKey(7)), threefry)


@pytest.mark.slow
def test_one_compilation_in_a_thousand_steps() -> None:
    sampler = isgd.importance_sampler(problem.NUM_EXAMPLES, batch_size=4, order_every=3)
    step = jax.jit(problem.make_step(sampler, problem.optimizer()), donate_argnums=(0, 1, 2))
    refresh, record = jax.jit(sampler.refresh, donate_argnums=0), jax.jit(sampler.record, donate_argnums=0)
    own, state, examples, key = problem.params(), sampler.init(), problem.data(), jax.random.key(0)
    opt_state = problem.optimizer().init(own)
    for at in range(1000):
        if at % 50 == 0:
            state = refresh(record(state, jnp.arange(6), jnp.full(6, 1.0 + at), version=state.version + 0))
        own, opt_state, state, _ = step(own, opt_state, state, examples, jax.random.fold_in(key, at))
    assert (step._cache_size(), refresh._cache_size(), record._cache_size()) == (1, 1, 1)
    _all_finite(state)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_from_saved_leaves_it_goes_on_bit_for_bit(kind: str) -> None:
    whole, half = problem.train(kind, steps=20), problem.train(kind, steps=11)
    file = io.BytesIO()
    np.savez(file, *jax.tree.leaves((half.params, half.state)))
    file.seek(0)
    with np.load(file) as saved:
        leaves = [jnp.asarray(saved[name]) for name in saved.files]
    begin = jax.tree.unflatten(jax.tree.structure((half.params, problem.samplers()[kind].init())), leaves)
    _goes_on(kind, begin, half, whole)


@pytest.mark.slow
def test_resumed_through_orbax_it_goes_on_bit_for_bit(tmp_path: Any) -> None:
    kind = "stratified"
    checkpoints = pytest.importorskip("orbax.checkpoint")
    whole, half = problem.train(kind, steps=20), problem.train(kind, steps=11)
    with checkpoints.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", (half.params, half.state))
        saver.wait_until_finished()
        begin = saver.restore(tmp_path / "state", (problem.params(), problem.samplers()[kind].init()))
    assert isinstance(begin[1], SamplerState)
    _goes_on(kind, begin, half, whole)


def _goes_on(kind: str, begin: Any, half: problem.Trained, whole: problem.Trained) -> None:
    rest = problem.train(kind, begin=begin, start=11, steps=9)
    assert np.array_equal(whole.indices, np.concatenate([half.indices, rest.indices]))
    assert not problem.unlike((whole.params, whole.state), (rest.params, rest.state), rtol=0.0)
