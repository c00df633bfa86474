import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sampling_problem import unchecked

from isgd_jax import reweight
from isgd_jax.gradients import lazy, per_example

PARAMS = {"w": jnp.asarray([1.0, -2.0, 0.5]), "b": jnp.asarray(0.25)}


def loss_fn(params: dict, example: tuple) -> jax.Array:
    x, y = example
    return 0.5 * (jnp.dot(params["w"], x, precision="highest") + params["b"] - y) ** 2


@pytest.fixture
def batch() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(6, 3)), jnp.float32), jnp.asarray(rng.normal(size=6), jnp.float32)


def stacked(batch: tuple) -> dict:
    return per_example.stacked_per_example_grads(loss_fn)(PARAMS, batch)


@pytest.mark.parametrize("lazy", [False, True])
def test_the_update_is_the_weighted_mean(batch: tuple, lazy: bool) -> None:
    grads = (per_example.per_example_grads if lazy else per_example.stacked_per_example_grads)(loss_fn)(PARAMS, batch)
    probs = jnp.asarray([0.1, 0.2, 0.05, 0.3, 0.25, 0.1])
    tx = reweight.importance_weighting(10)
    mean, _ = jax.jit(lambda g: tx.update(g, tx.init(PARAMS), PARAMS, probs=probs))(grads)
    for name, leaf in stacked(batch).items():
        weights = (1.0 / (10 * probs)).reshape(6, *[1] * (leaf.ndim - 1))
        np.testing.assert_allclose(mean[name], jnp.mean(weights * leaf, axis=0), rtol=1e-5, atol=1e-6)


def test_uniform_probabilities_recover_sgd_step_for_step(batch: tuple) -> None:
    ours = optax.chain(reweight.importance_weighting(6), optax.sgd(0.05, momentum=0.9, nesterov=True))
    theirs = optax.sgd(0.05, momentum=0.9, nesterov=True)
    a = b = PARAMS
    state_a, state_b = ours.init(a), theirs.init(b)
    for _ in range(10):
        grads = per_example.stacked_per_example_grads(loss_fn)(a, batch)
        updates, state_a = ours.update(grads, state_a, a, probs=jnp.full(6, 1 / 6))
        a = optax.apply_updates(a, updates)
        plain = jax.grad(lambda p: jnp.mean(jax.vmap(loss_fn, (None, 0))(p, batch)))(b)
        updates, state_b = theirs.update(plain, state_b, b)
        b = optax.apply_updates(b, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5), a, b)


def test_masked_draws_count_as_zero(batch: tuple) -> None:
    tx = reweight.importance_weighting(6)
    probs = jnp.asarray([0.1, 0.2, 0.3, 0.0, jnp.nan, 0.0])
    mask = jnp.asarray([True, True, True, False, False, False])
    found, _ = tx.update(stacked(batch), tx.init(PARAMS), PARAMS, probs=probs, mask=mask)
    kept = jax.tree.map(lambda g: g[:3], stacked(batch))
    wanted, _ = tx.update(kept, tx.init(PARAMS), PARAMS, probs=probs[:3])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(2 * x, y, rtol=1e-6), found, wanted)


def test_example_weights_aim_at_the_weighted_sum(batch: tuple) -> None:
    # By enumeration: each example drawn alone, averaged with its probability.
    target, probs = jnp.asarray([1.0, 0.0, 2.0, -1.0, 0.5, 3.0]), jnp.asarray([0.1, 0.1, 0.2, 0.3, 0.1, 0.2])
    tx = reweight.importance_weighting(6, target)
    state = tx.init(PARAMS)

    def alone(index: jax.Array) -> dict:
        grads = jax.tree.map(lambda g: g[index][None], stacked(batch))
        updates, _ = tx.update(grads, state, PARAMS, probs=probs[index][None], indices=index[None])
        return updates

    each = jax.vmap(alone)(jnp.arange(6))
    for name, leaf in stacked(batch).items():
        shape = (6, *[1] * (leaf.ndim - 1))
        np.testing.assert_allclose(
            jnp.sum(probs.reshape(shape) * each[name], axis=0), jnp.sum(target.reshape(shape) * leaf, axis=0), rtol=1e-5
        )
    with pytest.raises(TypeError, match=r"indices=draw\.indices"):
        tx.update(stacked(batch), state, PARAMS, probs=probs)


def test_forgetting_probs_is_a_type_error(batch: tuple) -> None:
    tx = optax.chain(reweight.importance_weighting(6), optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"probs=draw\.probs"):
        tx.update(stacked(batch), tx.init(PARAMS), PARAMS)


def test_a_plain_gradient_is_a_value_error(batch: tuple) -> None:
    plain = jax.tree.map(lambda g: g[0], stacked(batch))
    tx = reweight.importance_weighting(6)
    with pytest.raises(ValueError, match="got a plain gradient"):
        tx.update(plain, tx.init(PARAMS), PARAMS, probs=jnp.full(6, 1 / 6))


@pytest.mark.parametrize("params", [PARAMS, None])
@pytest.mark.parametrize("lazy", [False, True])
def test_gradients_of_another_draw_are_a_value_error(batch: tuple, params: dict | None, lazy: bool) -> None:
    grads = (per_example.per_example_grads if lazy else per_example.stacked_per_example_grads)(loss_fn)(PARAMS, batch)
    tx = reweight.importance_weighting(6)
    with pytest.raises(ValueError, match="come from the same draw"):
        tx.update(grads, tx.init(PARAMS), params, probs=jnp.full(5, 1 / 6))


def test_another_tree_is_a_value_error(batch: tuple) -> None:
    tx = reweight.importance_weighting(6)
    with pytest.raises(ValueError, match="tree like the parameters"):
        tx.update({"w": stacked(batch)["w"]}, tx.init(PARAMS), PARAMS, probs=jnp.full(6, 1 / 6))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [(0, ValueError), (-3, ValueError), (1.5, TypeError), (float("nan"), TypeError), (True, TypeError)],
)
def test_a_data_set_has_a_size(wrong: object, error: type[Exception]) -> None:
    with unchecked(), pytest.raises(error, match=f"num_examples must be .*, got {wrong}"):
        reweight.importance_weighting(wrong)


def test_whole_numbers_of_numpy_are_sizes(batch: tuple) -> None:
    with unchecked():
        tx = reweight.importance_weighting(np.int64(6))
    assert tx.update(stacked(batch), tx.init(PARAMS), PARAMS, probs=jnp.full(6, 1 / 6))[0]["w"].shape == (3,)


@pytest.mark.parametrize("wrong", [0.0, -0.1, float("nan"), float("inf"), 60.0])
def test_a_probability_that_is_none_is_refused_or_shows(batch: tuple, wrong: float) -> None:
    tx = reweight.importance_weighting(6)
    probs = jnp.asarray([0.1, 0.2, wrong, 0.3, 0.2, 0.2])
    with pytest.raises(ValueError, match=r"probs must be above 0 and at most 1, got .* for draw 2: pass"):
        tx.update(stacked(batch), tx.init(PARAMS), PARAMS, probs=probs)
    found = jax.jit(lambda probs: tx.update(stacked(batch), tx.init(PARAMS), PARAMS, probs=probs)[0])(probs)
    assert all(bool(jnp.all(jnp.isnan(leaf))) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("wrong", [6, -1, 2**31 - 1])
def test_an_index_of_no_example_is_refused_or_shows(batch: tuple, wrong: int) -> None:
    tx, probs = reweight.importance_weighting(6, jnp.arange(6.0)), jnp.full(6, 1 / 6)
    indices = jnp.asarray([0, 1, 2, 3, wrong, 5])

    def update(indices: jax.Array, mask: jax.Array | None = None) -> dict:
        return tx.update(stacked(batch), tx.init(PARAMS), PARAMS, probs=probs, indices=indices, mask=mask)[0]

    with pytest.raises(ValueError, match=f"indices must be those of 6 examples, 0 to 5; got {wrong} for draw 4"):
        update(indices)
    assert bool(jnp.all(jnp.isnan(jax.jit(update)(indices)["w"])))
    used = jnp.arange(6) != 4
    for call in (update, jax.jit(update)):  # padding may hold anything
        np.testing.assert_allclose(call(indices, used)["w"], call(jnp.arange(6), used)["w"], rtol=1e-6)


@pytest.mark.parametrize("name", ["probs", "mask", "target", "indices"])
def test_arrays_have_one_entry_a_draw(batch: tuple, name: str) -> None:
    tx = reweight.importance_weighting(6)
    given = {"probs": jnp.full(6, 1 / 6), "mask": jnp.ones(6, bool), "target": jnp.ones(6), "indices": jnp.arange(6)}
    with pytest.raises(ValueError, match=f"{name} must have one number a draw"):
        tx.update(stacked(batch), tx.init(PARAMS), PARAMS, **given | {name: given[name][0]})


@pytest.mark.parametrize("name", ["probs", "mask", "target", "indices"])
def test_lists_in_place_of_arrays_and_no_draws_are_refused(batch: tuple, name: str) -> None:
    """As the samplers refuse them; the leaf ``b`` of the gradients too."""
    tx, grads = reweight.importance_weighting(6), stacked(batch)
    given = {"probs": jnp.full(6, 1 / 6), "mask": jnp.ones(6, bool), "target": jnp.ones(6), "indices": jnp.arange(6)}
    state = tx.init(PARAMS)
    with unchecked():
        with pytest.raises(TypeError, match=rf"{name} must be an array, np.asarray\(...\), got list"):
            tx.update(grads, state, PARAMS, **given | {name: given[name].tolist()})
        with pytest.raises(TypeError, match=r"each leaf of the gradients must be an array, .* got list"):
            tx.update(grads | {"b": grads["b"].tolist()}, state, PARAMS, **given)
        with pytest.raises(ValueError, match=r"probs must have one number a draw, \[m\], m at least 1; got"):
            tx.update(grads, state, PARAMS, probs=jnp.zeros(0))
        with pytest.raises(TypeError, match=r"example_weights must be an array, .* got list"):
            reweight.importance_weighting(6, [1.0] * 6)


def test_weights_must_be_finite(batch: tuple) -> None:
    indices, probs = jnp.arange(6), jnp.full(6, 1 / 6)
    first, second = (
        tx.update(stacked(batch), tx.init(PARAMS), PARAMS, probs=probs, indices=indices)[0]["w"]
        for tx in (reweight.importance_weighting(6, w) for w in (jnp.ones(6), np.ones(6)))
    )
    np.testing.assert_array_equal(first, second)
    with pytest.raises(ValueError, match="example_weights must be finite, got nan at 1"):
        reweight.importance_weighting(2, np.asarray([1.0, np.nan], np.float32))


def test_example_weights_have_one_entry_an_example() -> None:
    with pytest.raises(ValueError, match="must have shape"):
        reweight.importance_weighting(6, jnp.ones(5))


def test_multi_steps_stands_outside(batch: tuple) -> None:
    tx = optax.chain(reweight.importance_weighting(6), optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation())
    state = tx.init(PARAMS)
    probs = jnp.full(6, 1 / 6)
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides a float by an int
        first, state = tx.update(stacked(batch), state, PARAMS, probs=probs)
        second, state = tx.update(stacked(batch), state, PARAMS, probs=probs)
    np.testing.assert_array_equal(first["w"], np.zeros(3))
    np.testing.assert_allclose(second["w"], -0.1 * jnp.mean(stacked(batch)["w"], axis=0), rtol=1e-5)


def test_donating_the_state_leaves_the_example_weights() -> None:
    weights = jnp.arange(3.0)
    tx = reweight.importance_weighting(3, example_weights=weights)
    jax.jit(lambda state: state, donate_argnums=0)(tx.init({}))
    assert weights.tolist() == [0.0, 1.0, 2.0]


LAZY = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)}
"""Used twice by `twice`: its gradient stays a sum of two products."""


def twice(params: dict, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.tanh(jnp.tanh(x @ params["w"]) @ params["w"].T))


@pytest.mark.parametrize(
    "before",
    [
        optax.scale(-1),
        optax.scale_by_schedule(lambda count: 0.1),
        optax.clip(1.0),
        optax.clip_by_global_norm(1.0),
        optax.normalize_by_update_norm(),
        optax.centralize(),
        optax.scale_by_sign(),
        optax.ema(0.9),
        optax.adam(1e-3),
        optax.stateless(lambda grads, _: jax.tree.map(lambda x: x + x, grads)),
    ],
    ids=["scale", "schedule", "clip", "global-norm", "normalize", "centralize", "sign", "ema", "adam", "own"],
)
@pytest.mark.parametrize("jitted", [False, True], ids=["seen", "jit"])
def test_arithmetic_on_lazy_gradients_is_an_error(before: optax.GradientTransformation, jitted: bool) -> None:
    tx, x = optax.chain(before, reweight.importance_weighting(9)), jnp.ones((5, 4))

    def updates(params: dict) -> dict:
        grads = per_example.per_example_grads(twice)(params, x)
        return tx.update(grads, tx.init(params), params, probs=jnp.full(5, 0.2))[0]

    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        (jax.jit(updates) if jitted else updates)(LAZY)


def test_the_error_of_arithmetic_on_lazy_gradients_says_what_to_do() -> None:
    grads = per_example.per_example_grads(twice)(LAZY, jnp.ones((5, 4)))
    with pytest.raises(TypeError, match=r"importance_weighting stands first in the chain, and isgd_jax\.weighted_mean"):
        jax.tree.map(lambda x: 0.5 * x, grads)


def test_lazy_gradients_go_through_all_that_moves_arrays() -> None:
    def grads_of(params: dict) -> dict:
        return per_example.per_example_grads(twice)(params, x)

    x = jax.random.normal(jax.random.key(0), (5, 4))
    expected = per_example.stacked_per_example_grads(twice)(LAZY, x)["w"]
    norms = jnp.linalg.norm(expected.reshape(5, -1), axis=1)
    grads = jax.device_put(jax.jit(grads_of)(LAZY), jax.devices()[0])
    rows = jax.tree.map(lambda leaf: leaf[jnp.array([3, 1])], grads)
    np.testing.assert_allclose(lazy.norms(rows), norms[jnp.array([3, 1])], rtol=1e-5)
    doubled = jax.vmap(grads_of)({"w": jnp.stack([LAZY["w"], LAZY["w"]])})
    np.testing.assert_allclose(lazy.norms(jax.tree.map(lambda leaf: leaf[1], doubled)), norms, rtol=1e-5)
    _, each = jax.lax.scan(lambda carry, _: (carry, grads_of(LAZY)), 0, length=2)
    np.testing.assert_allclose(lazy.norms(jax.tree.map(lambda leaf: leaf[0], each)), norms, rtol=1e-5)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), grads, rows)
    np.testing.assert_allclose(lazy.norms(joined)[:5], norms, rtol=1e-5)
    chosen = jax.lax.cond(jnp.array(True), lambda: grads_of(LAZY), lambda: grads)
    np.testing.assert_allclose(lazy.stack(chosen)["w"], expected, rtol=1e-5, atol=1e-6)
