"""What a problem takes, and what it refuses."""

from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from problems import linear_loss, linear_problem

import isgd_jax as isgd

N = 12
PARAMS, DATA = linear_problem(N)


def problem(**changes: Any) -> isgd.Problem:
    return isgd.Problem(**({"loss_fn": linear_loss, "params": PARAMS, "train": DATA} | changes))


def loss_with_key(params: Any, example: Any, key: jax.Array) -> jax.Array:
    return linear_loss(params, example) * jax.random.uniform(key)


class Model:
    """What is no array."""


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"params": {"w": Model()}},
            TypeError,
            "params must be a pytree of arrays, got a leaf of type Model",
        ),
        (
            {"params": nnx.Linear(4, 1, rngs=nnx.Rngs(0))},
            TypeError,
            "got the module Linear: take the arrays out .*nnx.split",
        ),
        ({"params": {}}, TypeError, "params must be a pytree of arrays, got no leaves at all"),
        (
            {"params": nnx.split(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))[1]},
            TypeError,
            r"got a random key at \['rngs'\].*: split off what is not trained, .* nnx.split\(model, nnx.Param, ...\)",
        ),
        (
            {"params": {"params": {"w": np.ones(3)}, "batch_stats": {"mean": np.ones(3)}}},
            TypeError,
            r"BatchNorm's statistics are among the params, .* give variables\[\"params\"\] alone",
        ),
        ({"params": nnx.split(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))[1]}, TypeError, "BatchNorm's statistics are among"),
        ({"train": {"x": [1.0, 2.0]}}, TypeError, "the data of 'train' must be arrays, got a float"),
        ({"train": {}}, ValueError, "the data of 'train' hold no arrays"),
        ({"train": {"x": np.ones(())}}, ValueError, "every array of 'train' needs a leading axis of ex"),
        ({"train": {"x": np.ones(3), "y": np.ones(4)}}, ValueError, r"must have one row an example, got \[3, 4\] rows"),
        ({"train": {"x": np.ones((0, 2))}}, ValueError, r"must have one row an example, got \[0\] rows"),
        ({"held_out": {"test": {"x": np.ones(3), "y": np.ones(4)}}}, ValueError, "the arrays of 'test' must have one"),
        ({"hold": "disk"}, ValueError, 'hold must be "device" or "host", got \'disk\''),
        (
            {"loss_fn": loss_with_key, "needs_key": True, "held_out": {"test": DATA}},
            ValueError,
            "the loss needs a key, so held-out data are measured by something else",
        ),
    ],
)
def test_what_is_no_problem_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        problem(**changes)


def test_parameters_are_given_and_copied_or_made_of_a_key(key: jax.Array) -> None:
    given = problem().init(key)
    chex.assert_trees_all_equal(given, PARAMS)
    assert given["w"] is not PARAMS["w"]
    made = problem(params=lambda key: {"w": jax.random.normal(key, (4,)), "b": jnp.zeros(())})
    chex.assert_trees_all_equal(made.init(key)["w"], jax.random.normal(key, (4,)))
    with pytest.raises(TypeError, match="params must be a pytree of arrays, got a leaf of type Model"):
        problem(params=lambda key: Model()).init(key)
    module = eqx.partition(eqx.nn.Linear(4, 1, key=key), eqx.is_array)[0]  # callable, and parameters all the same
    chex.assert_trees_all_equal(problem(params=module).init(key), module)


def test_each_example_has_a_key_of_its_own_and_is_augmented_by_it(key: jax.Array) -> None:
    keys = jax.random.split(key, N)
    made = problem(augment=lambda key, example: {**example, "y": jax.random.normal(key)})
    batch, handed_on = made.pictures(keys, DATA)
    chex.assert_trees_all_equal(batch["y"], jax.vmap(jax.random.normal)(keys))
    assert handed_on is None
    assert made.is_random
    random = problem(loss_fn=loss_with_key, needs_key=True)
    batch, handed_on = random.pictures(keys, DATA)
    chex.assert_trees_all_equal(batch, DATA)
    assert handed_on is keys
    first = jax.tree.map(lambda x: x[0], DATA)
    expected = linear_loss(PARAMS, first) * jax.random.uniform(keys[0])
    chex.assert_trees_all_close(random.loss(PARAMS, None, (first, keys[0])), expected)


def test_held_out_data_are_measured_in_slices_by_the_loss_or_by_what_is_named() -> None:
    losses = jax.vmap(linear_loss, (None, 0))(PARAMS, DATA)
    found = problem().evaluator(batch_size=5)(PARAMS, DATA)  # 12 rows: two slices and a rest
    chex.assert_trees_all_close(found, {"loss": jnp.mean(losses)}, rtol=1e-6)
    named = problem(
        loss_fn=lambda params, frozen, example: linear_loss(frozen, example),
        frozen=PARAMS,
        metrics={"twice": lambda params, frozen, example: 2 * linear_loss(frozen, example), "one": lambda *_: 1},
    )
    found = named.evaluator()(PARAMS, DATA)
    chex.assert_trees_all_close(found, {"twice": 2 * jnp.mean(losses), "one": jnp.ones(())}, rtol=1e-6)


@pytest.mark.slow
def test_a_scorer_measures_what_is_trained_alone(key: jax.Array) -> None:
    """Frozen arrays, also of whole numbers, add nothing to the norms."""
    frozen = {"b": PARAMS["b"], "column": jnp.int32(0), "table": np.arange(3)}

    def loss(params: Any, frozen: Any, example: Any) -> jax.Array:
        return linear_loss({**params, "b": frozen["b"]}, example) + example["x"][frozen["column"]]

    made = problem(loss_fn=loss, params={"w": PARAMS["w"]}, frozen=frozen)
    found = made.scorer()(made.published(key)({"w": PARAMS["w"]}, 3), DATA)
    residual = DATA["x"] @ PARAMS["w"] + PARAMS["b"] - DATA["y"]
    chex.assert_trees_all_close(found, jnp.abs(residual) * jnp.linalg.norm(DATA["x"], axis=1), rtol=1e-5)


def test_a_scorer_of_ones_own_finds_its_batch_beside_the_keys() -> None:
    score = problem().scorer(lambda loss_fn: lambda params, batch: jnp.abs(batch[0]["x"] @ params["w"]))
    np.testing.assert_array_equal(score((PARAMS, None), DATA), jnp.abs(DATA["x"] @ PARAMS["w"]))


def test_a_scorer_of_a_random_loss_has_new_keys_at_each_publication(key: jax.Array) -> None:
    made = problem(loss_fn=loss_with_key, needs_key=True)
    score, published = jax.jit(made.scorer(isgd.scorers.loss)), made.published(key)
    first, again, later = (score(published(PARAMS, step), DATA) for step in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    factors = first / jax.vmap(linear_loss, (None, 0))(PARAMS, DATA)
    assert len(set(np.round(np.asarray(factors), 4).tolist())) == N
    assert not np.allclose(first, later)
