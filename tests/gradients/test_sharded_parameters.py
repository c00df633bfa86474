"""Parameters that are split over a mesh: exact, split as they were, and no collective that `jax.grad` does not need."""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import isgd_jax as isgd
from isgd_jax.gradients import costs
from isgd_jax.gradients.leaf import is_factored, is_plain, leaves_of

pytestmark = pytest.mark.devices(8)

P = PartitionSpec
WIDTHS, B = (16, 32, 8), 16
TENSOR = {"w1": P(None, "model"), "b1": P("model"), "s1": P("model"), "w2": P("model", None), "b2": P(None)}
FULLY = {"w1": P("data", None), "b1": P("data"), "s1": P("data"), "w2": P("data", None), "b2": P("data")}
GATHERS = ("all-gather", "all-to-all", "collective-permute")


def make_loss(**placed: Any) -> Callable[..., jax.Array]:
    """A dense net; on an explicit mesh its second product must say where it goes, for `jax.grad` too."""

    def loss_fn(params: Any, example: Any) -> jax.Array:
        hidden = jax.nn.relu(example["x"] @ params["w1"] + params["b1"]) * params["s1"]
        out = jnp.dot(hidden, params["w2"], **placed) + params["b2"]
        return jnp.sum((out - example["y"]) ** 2)

    return loss_fn


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make_params() -> dict[str, jax.Array]:
    inside, hidden, out = WIDTHS
    weights = {"w1": normal(0, inside, hidden), "w2": normal(1, hidden, out)}
    return weights | {"b1": jnp.ones(hidden), "s1": jnp.ones(hidden), "b2": jnp.ones(out)}


def make_batch() -> dict[str, jax.Array]:
    return {"x": normal(2, B, WIDTHS[0]), "y": jnp.ones((B, WIDTHS[2]))}


def collectives(function: Callable[..., Any], *args: Any) -> Counter:
    text = jax.jit(function).lower(*args).compile().as_text()
    return Counter(
        re.findall(r"\b(all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(", text)
    )


def norms(params: Any, batch: Any, loss_fn: Any) -> Any:
    return isgd.norms(isgd.per_example_grads(loss_fn)(params, batch))


def both(params: Any, batch: Any, loss_fn: Any) -> Any:
    grads = isgd.per_example_grads(loss_fn)(params, batch)
    return isgd.norms(grads), isgd.weighted_mean(grads, jnp.ones(B))


def ordinary(params: Any, batch: Any, loss_fn: Any) -> Any:
    return jax.grad(lambda p: jnp.mean(jax.vmap(loss_fn, (None, 0))(p, batch)))(params)


def assert_close(found: Any, expected: Any, part: float = 1e-6) -> None:
    """Of each leaf, no entry is off by more than this part of the largest: single entries may have cancelled."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.max(np.abs(one - other)) <= part * np.max(np.abs(other))


CASES = [
    pytest.param(AxisType.Auto, (2, 2), TENSOR, id="auto, tensor parallel, 4 devices"),
    pytest.param(AxisType.Auto, (4, 2), TENSOR, id="auto, tensor parallel, 8 devices"),
    pytest.param(AxisType.Auto, (8, 1), FULLY, id="auto, fully sharded, 8 devices"),
    pytest.param(AxisType.Explicit, (4, 2), TENSOR, id="explicit, tensor parallel, 8 devices"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shape", "layout"), CASES)
def test_split_parameters_give_exact_norms_and_means_where_they_are(
    kind: AxisType, shape: tuple[int, int], layout: dict[str, PartitionSpec]
) -> None:
    params, batch = make_params(), make_batch()
    stacked = oracle.stacked(make_loss(), params, batch)
    expected = oracle.norms_of(stacked)
    mean = jax.tree.map(lambda x: np.mean(np.asarray(x, np.float64), axis=0), stacked)
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[: np.prod(shape)])
    is_explicit = kind == AxisType.Explicit
    loss_fn = make_loss(out_sharding=P(None)) if is_explicit else make_loss()
    with jax.set_mesh(mesh) if is_explicit else nullcontext():
        params = {name: jax.device_put(x, NamedSharding(mesh, layout[name])) for name, x in params.items()}
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
        found, found_mean = jax.jit(both, static_argnums=2)(params, batch, loss_fn)
        alone = jax.jit(isgd.scorers.grad_norm(loss_fn))(params, batch)
        plain = jax.jit(ordinary, static_argnums=2)(params, batch, loss_fn)
        needed, for_both, for_norms = (
            collectives(lambda p, b, f=function: f(p, b, loss_fn), params, batch)
            for function in (ordinary, both, norms)
        )
    assert_close((found, alone, found_mean), (expected, expected, mean))
    same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), found_mean, plain)
    assert all(jax.tree.leaves(same)), f"{found_mean} is placed otherwise than {plain}"
    for kind_of in GATHERS:
        assert for_both[kind_of] <= needed[kind_of], (kind_of, for_both, needed)
        assert for_norms[kind_of] <= needed[kind_of], (kind_of, for_norms, needed)


def test_stacked_gradients_of_split_parameters_stay_split() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        params = {name: jax.device_put(x, NamedSharding(mesh, TENSOR[name])) for name, x in make_params().items()}
        batch = jax.device_put(make_batch(), NamedSharding(mesh, P("data")))
        loss_fn = make_loss(out_sharding=P(None))
        found = jax.jit(lambda p, b: isgd.stack(isgd.per_example_grads(loss_fn)(p, b)))(params, batch)
    assert found["w1"].sharding.spec == P("data", None, "model")
    assert found["w2"].sharding.spec == P("data", "model", None)
    stacked = oracle.stacked(make_loss(), make_params(), make_batch())
    assert_close(found, stacked)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_replicated_parameters_inside_shard_map_have_each_example_s_own_gradients(check_vma: bool) -> None:
    """There `jax.grad` of what is the same on all devices sums over devices; ours and the definition must not."""
    params, batch, loss_fn = make_params(), make_batch(), make_loss()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def asked(params: Any, batch: Any) -> Any:
        grads = isgd.per_example_grads(loss_fn)(params, batch)
        mean = isgd.weighted_mean(grads, jnp.ones(batch["x"].shape[0]))
        stacked = isgd.norms(isgd.stacked_per_example_grads(loss_fn)(params, batch))
        alone = isgd.scorers.grad_norm(loss_fn, microbatch_size=1)(params, batch)
        return (isgd.norms(grads), stacked, alone), jax.lax.pmean(mean, "data")

    mapped = jax.shard_map(asked, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P("data"), P()), check_vma=check_vma)
    found, mean = jax.jit(mapped)(params, batch)
    stacked = oracle.stacked(loss_fn, params, batch)
    expected = oracle.norms_of(stacked)
    assert_close(found, (expected, expected, expected))
    assert_close(mean, jax.tree.map(lambda x: np.mean(np.asarray(x, np.float64), axis=0), stacked))


def test_scoring_in_slices_on_an_explicit_mesh() -> None:
    params, batch, loss_fn = make_params(), make_batch(), make_loss()
    expected = oracle.norms(loss_fn, params, batch)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        there = jax.device_put(batch, NamedSharding(mesh, P("data")))
        held = jax.device_put(params, NamedSharding(mesh, P()))
        found = jax.jit(isgd.scorers.grad_norm(loss_fn, microbatch_size=3))(held, there)
    assert found.sharding.spec == P("data")
    assert_close(found, expected)


def test_a_gradient_of_zero_has_norm_zero_where_parameters_are_split() -> None:
    """Dead units, and scales that are powers of two far apart: two divisors were made one, which was 0."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    weights = jax.device_put(np.ones((3, 4), np.float32), NamedSharding(mesh, P(None, "d")))

    def dead(params: Any, example: Any) -> jax.Array:
        return 0.5 * jnp.sum(jax.nn.relu(example @ params - 1e9) ** 2)

    found = jax.jit(lambda p, x: norms(p, x, dead))(weights, np.full((6, 3), 4.5, np.float32))
    np.testing.assert_array_equal(found, np.zeros(6))


def test_everything_can_be_asked_of_parameters_that_are_split_though_the_batch_is_not() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    expected = oracle.stacked(make_loss(), make_params(), make_batch())
    flat = np.concatenate([np.asarray(x).reshape(B, -1) for x in jax.tree.leaves(expected)], axis=1).astype(np.float64)
    with jax.set_mesh(mesh):
        params = {name: jax.device_put(x, NamedSharding(mesh, TENSOR[name])) for name, x in make_params().items()}
        loss_fn = make_loss(out_sharding=P(None))

        def asked(p: Any, b: Any) -> Any:
            grads = isgd.per_example_grads(loss_fn)(p, b)
            return isgd.gram(grads), isgd.inner(grads, p), isgd.norms(grads)

        gram, inner, found = jax.jit(asked)(params, make_batch())
    point = np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(make_params())]).astype(np.float64)
    assert_close((gram, inner, found), (flat @ flat.T, flat @ point, np.linalg.norm(flat, axis=1)), 2e-6)


@pytest.mark.parametrize("layout", [P(), P(None, "model")])
def test_losses_may_have_loops_where_an_explicit_mesh_splits_the_batch(layout: Any) -> None:
    def scanned(layers: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, layers)[0])

    layers, x = normal(0, 3, 4, 4), normal(1, 8, 3, 4)
    expected = oracle.norms(scanned, layers, x)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    placed = jax.device_put(layers, NamedSharding(mesh, layout)), jax.device_put(x, NamedSharding(mesh, P("data")))
    found = jax.jit(lambda layers, x: norms(layers, x, scanned))(*placed)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert jax.typeof(found).sharding.spec == P("data")


@pytest.mark.parametrize("on", [costs.CPU, costs.ACCELERATOR], ids=["cpu", "accelerator"])
def test_kernels_split_along_their_channels_have_their_gradients_where_they_are_formed(
    on: costs.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There `vmap(grad)` is wrong: XLA cuts a convolution of one kernel an example at other places."""

    def turned(kernel: jax.Array, x: jax.Array) -> jax.Array:
        layout = ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(x[None], kernel[::-1], (1,), "SAME", dimension_numbers=layout)
        return jnp.sum(jnp.tanh(y) ** 2)

    monkeypatch.setattr(costs, "machine", lambda: on)
    kernel, x = normal(0, 3, 4, 8), normal(1, 8, 9, 4)
    expected = oracle.norms(turned, kernel, x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    there = jax.device_put(kernel, NamedSharding(mesh, P(None, None, "data")))
    examples = jax.device_put(x, NamedSharding(mesh, P("data")))
    asked = jax.jit(lambda kernel, x: isgd.value_norms_and_mean(turned)(kernel, x, jnp.ones(8))[1:])
    found, mean = asked(there, examples)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert_close(mean, ordinary(kernel, x, turned))


def of_every_kind(params: Any, x: jax.Array) -> jax.Array:
    """A table, layers in one array, branches by a number that has no gradient, and what has none at all."""
    x = jnp.tanh(x + params["table"][jnp.asarray([2, 0, 2])])
    for place in (0, 2):
        x = jnp.tanh(x @ params["layers"][place])
    x = jax.lax.cond(params["branch"] > 0, lambda: jnp.sin(x @ params["dense"]), lambda: 2 * x)
    return jnp.sum(x**2)


def test_inside_shard_map_what_has_factors_keeps_them_and_zeros_are_seen() -> None:
    """There a zero counts as each device's own before anything is added to it."""
    params = {"table": normal(0, 5, 4), "layers": normal(1, 3, 4, 4), "dense": normal(2, 4, 4), "branch": jnp.ones(())}
    params |= {"unused": jnp.ones(())}
    x, seen = normal(3, 8, 3, 4), []
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def asked(params: Any, x: jax.Array) -> jax.Array:
        grads = isgd.per_example_grads(of_every_kind, joint=False)(params, x)
        seen.extend(leaves_of(grads))
        return isgd.norms(grads)

    mapped = jax.shard_map(asked, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(mapped)(params, x), oracle.norms(of_every_kind, params, x), rtol=2e-6)
    assert all(is_factored(leaf) and is_plain(leaf) for leaf in seen)


def heads_and_layers(params: Any, x: jax.Array) -> jax.Array:
    """Heads, whose two axes are one of the output, and layers of an array that are not all used."""
    slopes = jnp.einsum("td,hdk->thk", x, params["heads"])
    x = jnp.einsum("thk,hkd->td", jnp.tanh(slopes), params["out"])
    for place in (0, 2, 3):
        x = jnp.tanh(x @ params["layers"][..., place])
    return jnp.sum(x**2)


def formed_products(params: Any, x: jax.Array) -> jax.Array:
    """Weights that are used twice, in places that are split otherwise, and so often that products are formed."""
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer)
    for _ in range(2):
        x = jnp.tanh(x @ params["out"])
    return jnp.sum(x**2)


@pytest.mark.parametrize(
    ("loss_fn", "layout", "rows"),
    [
        pytest.param(heads_and_layers, {}, 3, id="heads, and layers that are not used"),
        pytest.param(formed_products, {"layers": P(None, None, "model"), "out": P(None, "model")}, 48, id="products"),
    ],
)
def test_whatever_has_a_gradient_on_an_explicit_mesh_has_norms_and_means_there(
    loss_fn: Any, layout: Any, rows: int
) -> None:
    params = {"heads": normal(0, 2, 4, 3), "out": normal(1, 2, 3, 4), "layers": normal(2, 4, 4, 4)}
    if layout:
        params = {"layers": normal(0, 2, 4, 4) / 2, "out": normal(1, 4, 4) / 2}
    x = normal(3, 8, rows, 4)
    stacked = oracle.stacked(loss_fn, params, x)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    placed = {name: jax.device_put(w, NamedSharding(mesh, layout.get(name, P()))) for name, w in params.items()}
    there = jax.device_put(x, NamedSharding(mesh, P("data")))
    asked = jax.jit(lambda params, x: isgd.value_norms_and_mean(loss_fn)(params, x, jnp.ones(8))[1:])
    with jax.set_mesh(mesh):
        found, mean = asked(placed, there)
    np.testing.assert_allclose(found, oracle.norms_of(stacked), rtol=2e-6)
    assert_close(mean, jax.tree.map(lambda g: np.mean(np.asarray(g, np.float64), axis=0), stacked))
