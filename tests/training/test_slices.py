"""Steps that take a few examples at a time: the same numbers as steps of the whole batch."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import isgd_jax as isgd
from isgd_jax.gradients import costs
from isgd_jax.gradients.sketches import last_layer_sketch
from isgd_jax.sampling.gates import with_gate
from isgd_jax.training.problem import Problem
from isgd_jax.training.train_step import Steps, TrainState, make_steps

N, M = 60, 33  # odd: the halves of a batch differ in size, and no slice divides both
FEATURES = {"frozen": jnp.linspace(-1.0, 1.0, 4)}


def convolved(params: Any, frozen: Any, example: Any, key: Array) -> Array:
    """A convolution, dropout, a frozen shift, and a last layer whose gradient is one outer product."""
    image = lax.conv(example["x"][None], params["kernel"], (1, 1), "SAME")[0]
    kept = jax.random.bernoulli(key, 0.9, image.shape)
    hidden = jnp.mean(jnp.where(kept, jnp.tanh(image), 0.0), axis=(1, 2)) + frozen["frozen"]
    logits = hidden @ params["out"]
    return -jax.nn.log_softmax(logits)[example["y"]]


def problem() -> Problem:
    random = np.random.default_rng(0)
    params = {
        "kernel": jnp.asarray(random.normal(size=(4, 2, 3, 3)) / 3, jnp.float32),
        "out": jnp.asarray(random.normal(size=(4, 3)), jnp.float32),
    }
    data = {"x": random.normal(size=(N, 2, 5, 5)).astype(np.float32), "y": np.arange(N, dtype=np.int32) % 3}
    return Problem(convolved, params, data, frozen=FEATURES, needs_key=True)


def prepared(sampler: isgd.BatchSampler, **options: Any) -> tuple[TrainState, Steps]:
    tx = optax.chain(isgd.importance_weighting(N), optax.sgd(0.3, momentum=0.5))
    made = problem()
    params = jax.tree.map(jnp.copy, made.params)
    return TrainState(params, tx.init(params), sampler.init()), make_steps(made, sampler, tx, **options)


def trained(
    key: Array, sampler: isgd.BatchSampler, *, shut: bool = False, steps: int = 9, **options: Any
) -> TrainState:
    state, made = prepared(sampler, **options)
    if shut:
        state = state._replace(sampler=with_gate(state.sampler, False))
    data = jax.tree.map(jnp.asarray, problem().train)
    loops = str(jax.make_jaxpr(made.step.__wrapped__)(state, FEATURES, data, key, jnp.float32(0.0))).count("scan[")
    for at in range(6):
        if at % 4 == 0:
            state = state._replace(sampler=sampler.refresh(state.sampler))
        state, _ = made.step(state, FEATURES, data, key, jnp.float32(at))
    return state, loops


def in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "CPU", costs.CPU._replace(written=1_000))  # less than an example's: slices of 8
    monkeypatch.setattr(costs, "machine", lambda: costs.CPU)


def sampler_of(kind: str) -> isgd.BatchSampler:
    if kind == "epochs":
        return isgd.shuffled_epochs(N, batch_size=M)
    if kind != "sketches":
        return isgd.importance_sampler(N, batch_size=M, sampler="poisson" if kind == "poisson" else "stratified")
    example = jax.tree.map(lambda x: x[0], problem().train)
    made = problem()
    sketch = last_layer_sketch(
        lambda params, example: convolved(params, FEATURES, example, jax.random.key(0)), made.params, example
    )
    return isgd.importance_sampler(N, batch_size=M, order=sketch)


@pytest.mark.parametrize(
    "kind",
    [
        "norms",
        "shut",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("losses", "sketches", "poisson", "epochs")),
    ],
)
def test_a_run_by_slices_is_that_of_whole_batches(kind: str, key: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, scores, sketches, calibration, gate and monitor after six steps, some of them in halves."""
    options: dict[str, Any] = {"shut": kind == "shut"}
    if kind == "losses":
        options["fresh_scores"] = lambda losses, grads: losses
    whole, none = trained(key, sampler_of(kind), **options)
    in_slices(monkeypatch)
    sliced, more = trained(key, sampler_of(kind), **options)
    assert more > none, "the step has no slices"
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5), sliced, whole)


@pytest.mark.slow
@pytest.mark.parametrize("written", [1_000, 1 << 30])  # slices; whole batches
def test_convolutions_keep_their_fast_layout_in_conditions_and_slices(
    written: int, key: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else XLA on a CPU takes tens of times as long for their gradients: in the slices, and where the gate decides."""
    monkeypatch.setattr(costs, "CPU", costs.CPU._replace(written=written))
    monkeypatch.setattr(costs, "machine", lambda: costs.CPU)
    state, steps = prepared(sampler_of("norms"))
    data = jax.tree.map(jnp.asarray, problem().train)
    program = jax.jit(steps.step.__wrapped__).lower(state, FEATURES, data, key, jnp.float32(0.0)).compile().as_text()
    assert " conditional(" in program
    labels = re.findall(r"convolution\(.*?dim_labels=([\w>-]+)", program)
    if jax.default_backend() == "cpu":
        assert labels
        assert set(labels) == {"b01f_01io->b01f"}


@pytest.mark.devices(4)
def test_on_an_explicit_mesh_steps_take_the_whole_batch(key: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of the caller's own that are split over devices: sums of slices would have to be split as they are."""
    in_slices(monkeypatch)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    random = np.random.default_rng(1)
    weights = random.normal(size=(8, 16)).astype(np.float32)
    data = {"x": jnp.asarray(random.normal(size=(N, 8)), jnp.float32)}
    tx = optax.chain(isgd.importance_weighting(N), optax.sgd(0.1))
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(weights, NamedSharding(mesh, PartitionSpec(None, "data")))}
        made = Problem(lambda params, example: jnp.sum(jnp.tanh(example["x"] @ params["w"]) ** 2), params, data)
        for sampler in (isgd.importance_sampler(N, batch_size=M), isgd.shuffled_epochs(N, batch_size=M, monitor=False)):
            state = TrainState(params, tx.init(params), sampler.init())
            step = make_steps(made, sampler, tx).step.__wrapped__
            after, _ = jax.jit(step)(state, None, data, key, jnp.float32(0.0))
            draw = sampler.sample(key, state.sampler)
            shares = np.asarray(draw.target / draw.probs, np.float64) / M
            hidden = np.tanh(np.asarray(data["x"])[draw.indices] @ weights.astype(np.float64))
            slopes = shares[:, None] * 2 * hidden * (1 - hidden**2)
            expected = weights - 0.1 * np.asarray(data["x"])[draw.indices].T @ slopes
            np.testing.assert_allclose(after.params["w"], expected, rtol=1e-4, atol=1e-5)
            assert jax.typeof(after.params["w"]).sharding.spec == PartitionSpec(None, "data")
