"""After 50 steps on four devices the state is that of one device: indices bit for bit, numbers to 1e-6 of the largest.

Under `jax.pmap` and `jax.shard_map` each device has its part of the draw (`share`); on a mesh the batch is split by a
constraint (Auto axes) or by its type (Explicit axes, the default of `jax.make_mesh`).
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sampling_problem as problem
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import isgd_jax as isgd

pytestmark = pytest.mark.devices(4)

DEVICES, STEPS = 4, 50
WAYS = ("pmap", "shard_map", "auto", "explicit")

ROUNDED = 1e-4
"""Of small differences of large numbers (what fractions differ by, the noise of moments), beside 1e-6 of all else."""


def _step(sampler: isgd.BatchSampler, *, share: bool = False, split: Callable[..., Any] | None = None) -> Any:
    """The step of one device; with ``share`` that of one of several, with ``split`` the batch is laid out by it."""
    tx = problem.optimizer()

    def step(own: Any, state: Any, data: Any, key: Any) -> Any:
        draw = sampler.sample(key, state, params=own, data=data)
        mine = isgd.share(draw, "data") if share else draw
        take = split or (lambda x, indices: x[indices])
        batch = jax.tree.map(lambda x: take(x, mine.indices), data)
        grads = isgd.per_example_grads(problem.loss_fn)(own, batch)
        updates, _ = tx.update(grads, tx.init(own), own, probs=mine.probs, mask=mine.mask, target=mine.target)
        if share:
            updates = jax.lax.pmean(updates, "data")
        state = sampler.observe(state, draw, grads, axis_name="data" if share else None)
        return optax.apply_updates(own, updates), state, draw.indices

    return step


def _run(sampler: isgd.BatchSampler, step: Any, refresh: Any, begin: Any, data: Any, steps: int) -> Any:
    own, state = begin
    seen: list[np.ndarray] = []
    first = None
    for at in range(steps):
        if at % problem.REFRESH_EVERY == 0:
            state = refresh(state)
        own, state, indices = step(own, state, data, jax.random.fold_in(jax.random.key(3), at))
        seen.append(np.asarray(indices))
        first = jax.tree.map(np.asarray, (own, state)) if first is None else first
    return own, state, np.stack(seen), first


def _begin(sampler: isgd.BatchSampler) -> Any:
    return problem.params(), sampler.init()


def _under_pmap(sampler: isgd.BatchSampler, steps: int = STEPS) -> Any:
    devices = jax.devices()[:DEVICES]
    step = jax.pmap(_step(sampler, share=True), "data", in_axes=(0, 0, 0, None), devices=devices)
    refresh = jax.pmap(sampler.refresh, devices=devices)
    begin, data = jax.tree.map(lambda x: np.stack([x] * DEVICES), (_begin(sampler), problem.data()))
    ran = jax.tree.map(np.asarray, _run(sampler, step, refresh, begin, data, steps))
    for leaf in jax.tree.leaves(ran[:2]):
        assert all(np.array_equal(leaf[0], other) for other in leaf[1:]), "the same state on all devices"
    return (*jax.tree.map(lambda x: x[0], ran[:2]), ran[2][:, 0], jax.tree.map(lambda x: x[0], ran[3]))


def _in_shard_map(sampler: isgd.BatchSampler, steps: int = STEPS) -> Any:
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])
    mapped = jax.shard_map(
        _step(sampler, share=True), mesh=mesh, in_specs=(P(), P(), P(), P()), out_specs=P(), check_vma=False
    )
    begin, data = jax.device_put((_begin(sampler), problem.data()), NamedSharding(mesh, P()))
    return _run(sampler, jax.jit(mapped), jax.jit(sampler.refresh), begin, data, steps)


def _on_auto_mesh(sampler: isgd.BatchSampler, steps: int = STEPS) -> Any:
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])

    def split(x: jax.Array, indices: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x[indices], NamedSharding(mesh, P("data")))

    begin, data = jax.device_put((_begin(sampler), problem.data()), NamedSharding(mesh, P()))
    step = jax.jit(_step(sampler, split=split), donate_argnums=(0, 1))
    return _run(sampler, step, jax.jit(sampler.refresh, donate_argnums=0), begin, data, steps)


def _on_explicit_mesh(sampler: isgd.BatchSampler, steps: int = STEPS) -> Any:
    def split(x: jax.Array, indices: jax.Array) -> jax.Array:
        return x.at[indices].get(out_sharding=P("data"))

    with jax.set_mesh(jax.make_mesh((DEVICES,), ("data",), devices=jax.devices()[:DEVICES])):
        step = jax.jit(_step(sampler, split=split), donate_argnums=(0, 1))
        refresh = jax.jit(sampler.refresh, donate_argnums=0)
        state = sampler.init()  # made on the mesh
        own, data = jax.tree.map(lambda x: jax.device_put(x, P(*(None,) * x.ndim)), (problem.params(), problem.data()))
        known = refresh._cache_size()  # functions are the sampler's own: another mesh has compiled them too
        ran = _run(sampler, step, refresh, (own, state), data, steps)
        assert step._cache_size() == 1
        assert refresh._cache_size() <= known + 1
        if sampler is problem.samplers()["stratified"]:
            str(sampler.report(ran[1]))
        else:  # a type that is split is refused while it is traced
            jax.eval_shape(sampler.report, ran[1])
    return ran


RUNS = dict(zip(WAYS, (_under_pmap, _in_shard_map, _on_auto_mesh, _on_explicit_mesh), strict=True))


@functools.cache
def _alone(kind: str) -> Any:
    """One device's run, once for all ways, by the programs of `test_sampler_modes.py`."""
    first = problem.train(kind, steps=1)
    rest = problem.train(kind, begin=(first.params, first.state), start=1, steps=STEPS - 1)
    return rest.params, rest.state, np.concatenate([first.indices, rest.indices]), (first.params, first.state)


def _solid(state: Any) -> Any:
    return state._replace(fractions=None, monitor=None)


DONE = ("stratified", "without_replacement")  # the second has a test of its own: it sketches
CASES = [
    *(("stratified", way) for way in WAYS),
    *((kind, way) for kind in problem.NAMES for way in ("shard_map", "explicit") if kind not in DONE),
]
"""Every way for the default; for each other kind the two that our code knows of: a part of the draw for each device,
and a batch whose type is split. (`jax.pmap` is the first by another name, Auto axes are the second left to XLA.)"""


QUICK = (("stratified", "shard_map"),)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "way"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_four_devices_are_one(kind: str, way: str) -> None:
    own, state, indices, first = _alone(kind)
    other_own, other_state, other_indices, other_first = RUNS[way](problem.samplers()[kind])
    assert np.array_equal(indices, other_indices)
    assert not problem.unlike(first, other_first, rtol=1e-5), "after one step, all of it"
    assert not problem.unlike((own, _solid(state)), (other_own, _solid(other_state)), rtol=1e-6)
    assert not problem.unlike(state, other_state, rtol=ROUNDED)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["shard_map", "explicit"])
def test_four_devices_are_one_in_their_sketches(way: str) -> None:
    """Until the second order is made: k-means makes much of a last bit, so later lines may differ."""
    kind = "without_replacement"
    one = problem.train(kind, steps=problem.REFRESH_EVERY)
    _, several, indices, _ = RUNS[way](problem.samplers()[kind], problem.REFRESH_EVERY)
    assert np.array_equal(one.indices, indices)
    assert not problem.unlike(one.state, several, rtol=ROUNDED)
    assert int(one.state.ordering.is_sketched.sum()) > problem.BATCH


@pytest.mark.slow
def test_lazy_gradients_of_several_layers_on_an_explicit_mesh() -> None:
    """A convolution and a sum over positions, and the same gradients stacked, with the batch axis split.

    (JAX itself cannot yet differentiate a convolution under `jax.vmap` there, nor look up rows by split indices.)
    """
    rng = np.random.default_rng(0)
    own = {
        "kernel": jnp.asarray(rng.normal(size=(3, 3, 4)), jnp.float32),
        "out": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32),
        "bias": jnp.zeros(2),
    }
    batch = jnp.asarray(rng.normal(size=(8, 6, 3)), jnp.float32)

    def loss_fn(own: Any, x: Any) -> jax.Array:
        numbers = ("NWC", "WIO", "NWC")
        hidden = jax.lax.conv_general_dilated(x[None], own["kernel"], (1,), "SAME", dimension_numbers=numbers)
        return jnp.sum(jnp.square(jnp.mean(jnp.tanh(hidden[0]) @ own["out"] + own["bias"][None], axis=0)))

    @jax.jit
    def run(own: Any, batch: Any) -> Any:
        lazy, weights = isgd.per_example_grads(loss_fn)(own, batch), jnp.linspace(0.5, 2.0, 8)
        return [
            (isgd.norms(grads), isgd.weighted_mean(grads, weights), isgd.inner(grads, own), isgd.gram(grads))
            for grads in (lazy, isgd.stack(lazy))
        ]

    alone = run(own, batch)
    with jax.set_mesh(jax.make_mesh((DEVICES,), ("data",), devices=jax.devices()[:DEVICES])):
        assert not problem.unlike(alone, run(own, jax.device_put(batch, P("data", None, None))), rtol=1e-5)


@pytest.mark.parametrize("is_set", [False, True])
def test_a_batch_split_over_an_explicit_mesh_whether_it_is_set_or_not(is_set: bool) -> None:
    """Without `jax.set_mesh` the mesh is that of the arrays."""

    @jax.jit
    def run(own: Any, batch: Any) -> Any:
        grads, weights = isgd.per_example_grads(problem.loss_fn)(own, batch), jnp.linspace(0.5, 2.0, 8)
        one_pass = isgd.value_norms_and_mean(problem.loss_fn, halves=True)
        return isgd.weighted_mean(grads, weights), isgd.gram(grads), one_pass(own, batch, weights)

    own, batch = problem.params(), jax.tree.map(lambda x: x[:8], problem.data())
    alone = run(own, batch)
    mesh = jax.make_mesh((DEVICES,), ("data",), devices=jax.devices()[:DEVICES])
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        several = run(own, jax.device_put(batch, NamedSharding(mesh, P("data", None))))
    assert not problem.unlike(alone, several, rtol=1e-5)


@pytest.mark.slow
def test_arrays_split_over_an_explicit_mesh_give_the_draws_of_one_device() -> None:
    """Masses, orders, indices and scores may come split: laws and tables are whole on each device."""

    @jax.jit
    def run(masses: jax.Array, ids: jax.Array) -> Any:
        order = isgd.samplers.order_by(masses)
        law = isgd.samplers.update(isgd.samplers.prepare(masses, order), ids, masses[::-1])
        draw = isgd.samplers.stratified(jax.random.key(0), masses, num_draws=4)
        table, _ = isgd.score_table.record(isgd.score_table.create(8), ids, masses, version=0)
        capped = isgd.samplers.capped(masses, num_draws=2)
        known = isgd.samplers.probabilities_of(law, ids), isgd.samplers.probabilities(law)
        return draw.indices, draw.probs, order, known, table, capped.masses

    masses, ids = jnp.linspace(1.0, 3.0, 8), jnp.arange(8, dtype=jnp.int32)
    alone = run(masses, ids)
    mesh = jax.make_mesh((DEVICES,), ("data",), devices=jax.devices()[:DEVICES])
    split = jax.device_put((masses, ids), NamedSharding(mesh, P("data")))
    assert not problem.unlike(alone, run(*split), rtol=1e-6)


def test_scores_and_sketches_split_over_an_explicit_mesh_are_recorded_as_on_one_device() -> None:
    sampler = isgd.importance_sampler(8, batch_size=4, order=problem.sketch(dims=4), calibrate=False)
    rng = np.random.default_rng(0)
    state, scores = sampler.init(), jnp.asarray(1.0 + rng.random(8), jnp.float32)
    sketches = jnp.asarray(rng.normal(size=state.ordering.sketches.shape), jnp.float32)
    found = jnp.arange(8, dtype=jnp.int32), scores, sketches

    @jax.jit
    def recorded(state: Any, ids: Any, scores: Any, sketches: Any) -> Any:
        return sampler.record(state, ids, scores, version=0, sketches=sketches)

    mesh = jax.make_mesh((DEVICES,), ("data",), devices=jax.devices()[:DEVICES])
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    several = recorded(jax.device_put(state, whole), *jax.device_put(found, split))
    assert not problem.unlike(recorded(state, *found), several, rtol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", problem.NAMES)
def test_a_state_split_over_an_explicit_mesh_is_that_of_one_device(kind: str) -> None:
    """In a loop that carries it: what comes out lies as it came."""
    sampler = problem.samplers()[kind]

    def step(state: Any, _: Any) -> Any:
        own, data = problem.params(), problem.data()
        draw = sampler.sample(jax.random.key(0), state, params=own, data=data)
        state = sampler.observe(state, draw, norms=1.0 + draw.indices.astype(jnp.float32))
        if sampler.is_scored:
            state = sampler.record(state, jnp.arange(8, dtype=jnp.int32), jnp.linspace(1.0, 4.0, 8), version=3)
        sampler.report(state)  # is traced, and of no interest
        return sampler.refresh(state), draw

    run = jax.jit(lambda state: jax.lax.scan(step, state, length=5))
    mesh = jax.make_mesh((DEVICES,), ("data",), devices=jax.devices()[:DEVICES])
    state = sampler.init()
    where = jax.tree.map(
        lambda x: NamedSharding(mesh, P("data") if x.ndim and x.shape[0] % DEVICES == 0 else P()), state
    )
    alone, several = run(state), run(jax.device_put(state, where))
    assert not problem.unlike(alone, several, rtol=1e-5)
    assert jax.tree.all(jax.tree.map(lambda x, to: x.sharding.is_equivalent_to(to, x.ndim), several[0], where))


def test_a_domain_on_an_explicit_mesh_is_that_of_one_device() -> None:
    """Its state whole or split, and scores computed in parts, without `jax.set_mesh`."""
    domain = isgd.domain_sampler(lambda unit: unit, dims=2, batch_size=4, num_boxes=4)
    mesh = jax.make_mesh((DEVICES,), ("data",), devices=jax.devices()[:DEVICES])
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def drawn(state: Any, where: Any) -> Any:
        def score(points: Any) -> Any:
            return (points if where is None else jax.sharding.reshard(points, where))[:, 0] ** 2

        state = domain.refresh(jax.random.key(0), state, score)
        return state, domain.sample(jax.random.key(0), state, 3)

    run = jax.jit(drawn, static_argnums=1)
    first, _ = run(domain.init(), None)
    alone = run(first, None)
    parts = jax.tree.map(lambda x: jax.device_put(x, split if x.shape[:1] == (4,) else whole), first)
    assert not problem.unlike(alone, run(jax.device_put(first, whole), None), rtol=1e-6)
    assert not problem.unlike(alone, run(parts, split), rtol=1e-6)


def test_a_domain_is_refreshed_and_shared_inside_shard_map() -> None:
    """Each device its part of one draw, or a density and points by a key of its own."""
    domain = isgd.domain_sampler(lambda unit: unit, dims=2, batch_size=8, num_boxes=4)
    mesh = jax.make_mesh((DEVICES,), ("data",), devices=jax.devices()[:DEVICES])

    def drawn(key: Any, state: Any) -> Any:
        return domain.sample(key, domain.refresh(key, state, lambda x: x[:, 0]), 3)

    def both(key: Any, state: Any) -> Any:
        own = jax.random.fold_in(key, jax.lax.axis_index("data"))
        return isgd.share(drawn(key, state), "data"), drawn(own, state)

    key, state = jax.random.key(0), domain.init()
    shared, own = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=P(), out_specs=P("data")))(key, state)
    assert not problem.unlike(shared, jax.jit(drawn)(key, state), rtol=1e-6)
    third = jax.jit(drawn)(jax.random.fold_in(key, 2), state)
    assert not problem.unlike(jax.tree.map(lambda x: np.asarray(x)[16:24], own), third, rtol=1e-6)


@pytest.mark.slow
def test_draws_that_cannot_be_cut_are_refused() -> None:
    sampler = problem.jitted(isgd.importance_sampler(24, batch_size=6))
    shared = jax.vmap(lambda draw, _: isgd.share(draw, "data"), (None, 0), axis_name="data")
    draw = sampler.sample(jax.random.key(0), sampler.init())
    with pytest.raises(ValueError, match="6 draws cannot be shared equally among 4 devices"):
        shared(draw, jnp.arange(4))
    parts = shared(draw, jnp.arange(3))
    np.testing.assert_array_equal(parts.indices.reshape(-1), draw.indices)
    np.testing.assert_array_equal(parts.probs.reshape(-1), draw.probs)


@pytest.mark.slow
def test_a_part_of_the_gradients_without_the_axis_is_refused() -> None:
    sampler = problem.jitted(isgd.importance_sampler(24, batch_size=8))
    state = sampler.init()
    draw = sampler.sample(jax.random.key(0), state)
    part = {"w": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"expected norms of the 8 draws.*axis_name="):
        sampler.observe(state, draw, part)
