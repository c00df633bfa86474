"""Convolutions in the layout that is fast on a CPU: the same numbers, inside loops too."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax

import isgd_jax as isgd
from isgd_jax.engines import scorers
from isgd_jax.gradients import costs
from isgd_jax.gradients.convolutions import in_fast_layout
from isgd_jax.gradients.jaxpr import relaid

LAYOUTS = [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CHWN", "IHWO", "HWNC"), ("HWCN", "OHWI", "NHWC")]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "strides": {"window_strides": (2, 1)},
    "dilated": {"lhs_dilation": (1, 2), "rhs_dilation": (2, 1)},
    "groups of channels": {"feature_group_count": 2},
    "groups of examples": {"batch_group_count": 2},
}


def laid_out(array: np.ndarray, axes: str, layout: str) -> jax.Array:
    return jnp.asarray(np.transpose(array, [axes.index(axis) for axis in layout]))


@pytest.mark.parametrize("way", WAYS)
def test_in_any_layout_a_convolution_gives_the_same(way: str) -> None:
    random, how = np.random.default_rng(0), {"window_strides": (1, 1), "padding": ((1, 1), (0, 2))} | WAYS[way]
    images = random.normal(size=(4, 7, 8, 6)).astype(np.float32)
    kernels = random.normal(size=(3, 2, 6 // how.get("feature_group_count", 1), 10)).astype(np.float32)
    for layout in LAYOUTS:
        left, right = laid_out(images, "NHWC", layout[0]), laid_out(kernels, "HWIO", layout[1])
        numbers = lax.conv_dimension_numbers(left.shape, right.shape, layout)

        def convolve(x: Any, y: Any, numbers: Any) -> Any:
            return lax.conv_general_dilated(x, y, dimension_numbers=numbers, **how)

        found = in_fast_layout(convolve, left, right, numbers)
        np.testing.assert_allclose(found, convolve(left, right, numbers), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_kernel_whose_spatial_axes_change_places_has_its_own_gradient(groups: int) -> None:
    random = np.random.default_rng(0)
    kernel, images = random.normal(size=(4, 4 // groups, 3, 2)), random.normal(size=(3, 4, 6, 5))

    def loss_fn(kernel: jax.Array, image: jax.Array) -> jax.Array:
        swapped = jnp.swapaxes(kernel, 2, 3)
        return jnp.sum(
            jnp.sin(lax.conv_general_dilated(image[None], swapped, (1, 1), "SAME", feature_group_count=groups))
        )

    oracle.check(loss_fn, jnp.asarray(kernel, jnp.float32), jnp.asarray(images, jnp.float32))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_inside_a_loop_every_convolution_is_in_the_fast_layout(
    layout: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA leaves others as they are there, and computes them tens of times slower."""
    monkeypatch.setattr(costs, "machine", lambda: costs.CPU)

    def loss_fn(kernels: Any, image: jax.Array) -> jax.Array:
        x = image[None]
        for kernel in kernels:
            x = jnp.tanh(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout))
        return jnp.sum(x**2)

    random = np.random.default_rng(1)
    shapes = [(3, 3, 2, 4), (3, 3, 4, 4), (3, 3, 4, 3)]
    kernels = [laid_out(random.normal(size=s).astype(np.float32), "HWIO", layout[1]) for s in shapes]
    images = laid_out(random.normal(size=(6, 5, 5, 2)).astype(np.float32), "NHWC", layout[0])

    def asked(kernels: Any, images: Any) -> Any:
        norms = scorers.grad_norm(loss_fn, microbatch_size=2)(kernels, images)
        return norms, isgd.value_norms_and_mean(loss_fn, microbatch_size=2)(kernels, images, jnp.ones(6))

    program = jax.jit(asked).lower(kernels, images).compile()
    found, (_, norms, mean) = program(kernels, images)
    np.testing.assert_allclose(found, oracle.norms(loss_fn, kernels, images), rtol=1e-5)
    np.testing.assert_allclose(norms, found, rtol=1e-5)
    right = jax.grad(lambda k: jnp.mean(jax.vmap(loss_fn, (None, 0))(k, images)))(kernels)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), mean, right)
    if jax.default_backend() == "cpu":
        labels = set(re.findall(r"convolution\(.*?dim_labels=([\w>-]+)", program.as_text()))
        assert labels == {"b01f_01io->b01f"}


def test_the_layout_of_a_machine_without_a_fast_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "machine", lambda: costs.ACCELERATOR)
    numbers = lax.conv_dimension_numbers((1, 3, 5, 5), (2, 3, 3, 3), ("NCHW", "OIHW", "NCHW"))
    asked = []
    in_fast_layout(
        lambda x, y, given: asked.append(given) or x, jnp.ones((1, 3, 5, 5)), jnp.ones((2, 3, 3, 3)), numbers
    )
    assert asked == [numbers]


def test_a_forward_pass_in_slices_is_laid_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean loss of all data, of a network that has its channels first, as PyTorch and Equinox have them."""
    monkeypatch.setattr(costs, "machine", lambda: costs.CPU)
    kernel, images = (
        jnp.ones((4, 3, 3, 3)),
        jnp.asarray(np.random.default_rng(2).normal(size=(8, 3, 5, 5)), jnp.float32),
    )

    def loss(image: jax.Array) -> dict[str, jax.Array]:
        return {"loss": jnp.sum(jnp.tanh(lax.conv(image[None], kernel, (1, 1), "SAME")))}

    program = jax.jit(lambda x: lax.map(relaid(loss), x, batch_size=4)).lower(images).compile()
    np.testing.assert_allclose(program(images)["loss"], jax.vmap(loss)(images)["loss"], rtol=1e-5)
    if jax.default_backend() == "cpu":
        assert set(re.findall(r"convolution\(.*?dim_labels=([\w>-]+)", program.as_text())) == {"b01f_01io->b01f"}
