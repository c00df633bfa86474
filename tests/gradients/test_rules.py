"""Every rule by which a gradient is cut, in every type, against one `jax.grad` an example in float64.

Each case is the program of a parameter's gradient itself, written out as the backward pass of a loss: two factors of an
example go in, a contraction and the operation under test come out. A rule that no case reaches fails a test.
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, PartitionSpec

import isgd_jax as isgd
from isgd_jax.gradients.cuts import RULES
from isgd_jax.gradients.leaf import is_factored
from isgd_jax.gradients.squares import has_cancelled
from isgd_jax.gradients.terms import gram_squares

B, T, I, O = 3, 5, 4, 6  # noqa: E741
SMOOTH = {
    "float32": 1e-6, "float64": 1e-13, "bfloat16": 4e-3, "float16": 1e-3, "complex64": 1e-6, "complex128": 1e-13,
}  # fmt: skip
"""Types, and the error that is allowed in each, beside that of `vmap(grad)` in the same type."""


def dot(x, y):
    return lax.dot_general(x, y, (((0,), (0,)), ((), ())))


def scalar(y):
    """A scalar of the example's own."""
    return y[0, 0] + jnp.ones((), y.dtype)


def in_a_carry(x, y):
    def blocks(total, rows):
        return total + dot(*rows), None

    return lax.scan(blocks, jnp.zeros((I, O), x.dtype), (jnp.stack([x, 2 * x]), jnp.stack([y, y])))[0]


def layer_by_layer(x, y):
    return lax.scan(lambda _, rows: (None, dot(*rows)), None, (jnp.stack([x, 2 * x]), jnp.stack([y, y])))[1]


def at_slices(x, y):
    """The gradient of an array whose slices are taken by index: sums of slices that are padded with zeros."""
    layers = [dot(x, y), dot(x[::-1], y), dot(2 * x, y)]
    return jax.vjp(lambda w: [w[:, 2], w[:, 0], w[:, 2]], jnp.zeros((I, 3, O), x.dtype))[1](layers)[0]


def taken_apart(x, y):
    return jax.vjp(lambda w: [*jnp.unstack(w, axis=1)], jnp.zeros((I, 2, O), x.dtype))[1]([dot(x, y), dot(x[::-1], y)])[
        0
    ]


def stacked(x, y):
    zeros = jnp.zeros((I, O), x.dtype)
    return jax.vjp(lambda a, b: jnp.stack([a, b], 0), zeros, zeros)[1](layer_by_layer(x, y))[1]


def of_split(x, y):
    pieces = [dot(x, y[:, :2]), dot(x[::-1], y[:, 2:])]
    return jax.vjp(lambda w: lax.split(w, (2, O - 2), axis=1), jnp.zeros((I, O), x.dtype))[1](pieces)[0]


def rows_by_index(x, y):
    at = jnp.array([0, 2, 2, 7, 1], jnp.uint8)
    return jnp.zeros((300, O), y.dtype).at[at].add(y, mode="drop")


def convolution(x, y):
    image = jnp.stack([x, jnp.flip(x, 0)])[:, :, :, None]  # [2, t, i, 1]: channels in the batch's place
    slopes = jnp.broadcast_to(y[:2, :2].reshape(1, 2, 2, 1), (1, 2, 2, 3))
    return lax.conv_general_dilated(image, slopes, (1, 1), "VALID", dimension_numbers=("NHWC", "IHWO", "NHWC"))


def wider(x, y, narrow="bfloat16"):
    """Products in a narrow type, scaled in a wider one, as after mixed precision or a loss scale."""
    return dot(x.astype(narrow), y.astype(narrow)).astype(jnp.float32) * jnp.float32(1e-6)


def summed_wider(x, y):
    """A sum over an axis that one factor alone has, of entries near the end of float16."""
    many = dot(x.astype(jnp.float16), jnp.repeat(100 * y, 300, axis=1).astype(jnp.float16)).astype(jnp.float32)
    return jnp.sum(many.reshape(I, O, 300), axis=2)


REAL = {
    "dot_general": dot,
    "neg": lambda x, y: -dot(x, y),
    "add": lambda x, y: dot(x, y) + dot(2 * x, y),
    "add_any": lambda x, y: jax.vjp(lambda w: (w, w), dot(x, y))[1]((dot(x, y), dot(x[::-1], y)))[0],
    "sub": lambda x, y: dot(x, y) - dot(y[:, :I], x[:, jnp.arange(O) % I]),
    "mul by a number": lambda x, y: dot(x, y) * 1e-3,
    "mul on the left": lambda x, y: scalar(y) * dot(x, y),
    "div": lambda x, y: dot(x, y) / scalar(y),
    "broadcast_in_dim": lambda x, y: lax.broadcast_in_dim(dot(x, y), (1, I, 1, O), (1, 3)),
    "reshape": lambda x, y: dot(x, y).reshape(2, I * O // 2),
    "squeeze": lambda x, y: lax.squeeze(dot(x, y)[None], (0,)),
    "expand_dims": lambda x, y: lax.expand_dims(dot(x, y), (2,)),
    "transpose": lambda x, y: dot(x, y).T,
    "reduce_sum": lambda x, y: jnp.sum(dot(jnp.stack([x, x[::-1]], 1).reshape(T, 2 * I), y).reshape(2, I, O), 0),
    "pad": lambda x, y: lax.pad(dot(x, y), np.zeros((), x.dtype), ((1, 2, 0), (0, 1, 2))),
    "slice": lambda x, y: lax.slice(dot(x, y), (1, 0), (I, O), (2, 1)),
    "split": lambda x, y: lax.split(dot(x, y), (2, 4), axis=1)[1],
    "add_any, of slices": at_slices,
    "stack": taken_apart,
    "unstack": stacked,
    "concatenate": of_split,
    "concatenate, of layers": lambda x, y: lax.concatenate([dot(x, y)[:, None], dot(2 * x, y)[:, None]], 1),
    "copy": lambda x, y: jnp.copy(dot(x, y)),
    "optimization_barrier": lambda x, y: lax.optimization_barrier((dot(x, y), x))[0],
    "reduce_precision": lambda x, y: lax.reduce_precision(dot(x, y), 8, 7) if x.dtype == jnp.bfloat16 else dot(x, y),
    "scan, carried": in_a_carry,
    "scan, stacked": layer_by_layer,
    "cond": lambda x, y: lax.cond(jnp.real(y[0, 0]) > 0, lambda: dot(x, y), lambda: 2 * dot(y[:, :I], y)),
    "scatter-add": rows_by_index,
    "conv_general_dilated": convolution,
    "small": lambda x, y: dot(x * 1e-2, y * 1e-2) * 1e-2,
}
COMPLEX = {
    "conj": lambda x, y: jnp.conj(dot(x, y)),
    "real": lambda x, y: jnp.real(dot(x, y)),
    "imag": lambda x, y: jnp.imag(dot(x, y)),
    "real, of one complex factor": lambda x, y: jnp.real(dot(jnp.real(x).astype(x.dtype), y)),
    "imag, of the other": lambda x, y: jnp.imag(dot(x, jnp.real(y).astype(x.dtype))),
    "complex": lambda x, y: lax.complex(jnp.real(dot(x, y)), dot(jnp.imag(x), jnp.real(y))),
    "real to complex": lambda x, y: dot(jnp.real(x), jnp.real(y)).astype(x.dtype) * scalar(y),
    "complex to real": lambda x, y: jax.vjp(lambda w: w.astype(x.dtype), jnp.real(dot(x, y)))[1](dot(x, y))[0],
    "fft": lambda x, y: jnp.real(jnp.fft.fft(dot(x, y))),
}
WIDER = {
    "bfloat16, scaled in float32": lambda x, y: wider(x, y),
    "float16, scaled in float32": lambda x, y: wider(x, y, "float16"),
    "float16, far scales": lambda x, y: wider(x, y, "float16") * jnp.float32(1e-20) * jnp.float32(1e16),
    "float16, summed in float32": summed_wider,
}
EXACTLY = {
    "int8 to float32": lambda x, y: dot_in(x, y, jnp.int8, jnp.int32).astype(jnp.float32) * 0.01,
    "int8, negated": lambda x, y: -dot_in(x - 200, y - 200, jnp.int8, jnp.int32).astype(jnp.float32),
    "int8, wrapping": lambda x, y: dot_in(x, y, jnp.int8, jnp.int8).astype(jnp.float32),
    "int8, moved about": lambda x, y: dot_in(x, y, jnp.int8, jnp.int32).T[1:].reshape(-1, 2).astype(jnp.float32),
    "uint8": lambda x, y: dot_in(jnp.abs(x), jnp.abs(y), jnp.uint8, jnp.uint32).astype(jnp.float32),
    "uint8 below zero": lambda x, y: (-dot_in(jnp.abs(x), jnp.abs(y), jnp.uint8, jnp.uint32)).astype(jnp.float32),
    "to an integer and back": lambda x, y: dot(x, y).astype(jnp.int32).astype(jnp.float32),
    "integers divided": lambda x, y: (dot_in(x, y, jnp.int8, jnp.int32) // 7).astype(jnp.float32),
    "to eight bits and back": lambda x, y: dot(x, y).astype(jnp.float8_e4m3fn).astype(jnp.float32),
    "of eight bits": lambda x, y: lax.dot_general(
        x.astype(jnp.float8_e4m3fn), y.astype(jnp.float8_e4m3fn), (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    ),
    "few bits after the point": lambda x, y: lax.reduce_precision(dot(x, y), 8, 3),
    "a boolean and back": lambda x, y: (dot(x, y) > 0).astype(jnp.float32),
    "rounded": lambda x, y: jnp.round(dot(x, y)),
}  # fmt: skip
"""What is linear only in part, or not at all: held to `jax.grad` in the program's own types."""


def dot_in(x, y, factors, result):
    def whole(x):
        return jnp.clip(jnp.round(30 * x), jnp.iinfo(factors).min, jnp.iinfo(factors).max).astype(factors)

    return lax.dot_general(whole(x), whole(y), (((0,), (0,)), ((), ())), preferred_element_type=result)


def loss_of(programs: dict[str, Any]) -> Any:
    """A loss whose gradient with respect to the parameter of each name is that program of the example."""

    def with_gradient(program: Any) -> Any:
        function = jax.custom_vjp(lambda w, x, y: jnp.zeros((), jnp.float32))
        function.defvjp(lambda w, x, y: (jnp.zeros((), jnp.float32), (x, y)), lambda r, _: (program(*r), None, None))
        return function

    functions = {name: with_gradient(program) for name, program in programs.items()}

    def loss_fn(params: Any, example: Any) -> Any:
        return sum(functions[name](w, example["x"], example["y"]) for name, w in params.items())

    return loss_fn


def factors(dtype: Any) -> dict[str, np.ndarray]:
    """What the type holds exactly, as the widest of its kind."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(B, T, I)), random.normal(size=(B, T, O))
    if jnp.issubdtype(dtype, jnp.complexfloating):
        x, y = x + 1j * random.normal(size=x.shape), y + 1j * random.normal(size=y.shape)
    return {"x": x.astype(dtype), "y": y.astype(dtype)}


def params_of(programs: dict[str, Any], batch: Any) -> dict[str, Any]:
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    shapes = {name: jax.eval_shape(program, one["x"], one["y"]) for name, program in programs.items()}
    return {name: jnp.asarray(np.zeros(x.shape, x.dtype)) for name, x in shapes.items()}


def ask(programs: dict[str, Any], batch: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Lazy gradients, what they say of each parameter, and the stacked ones."""
    params, loss_fn = params_of(programs, batch), loss_of(programs)
    tree = jax.tree.map(lambda w: jnp.asarray(np.full(w.shape, 1 + 2j if jnp.iscomplexobj(w) else 1, w.dtype)), params)

    def asked(params: Any, batch: Any) -> Any:
        grads = isgd.per_example_grads(loss_fn, joint=False)(params, batch)
        of = {
            name: {
                "norms": isgd.norms(leaf),
                "mean": isgd.weighted_mean(leaf, jnp.ones(B)),
                "stack": isgd.stack(leaf),
                "gram": isgd.gram(leaf),
                "inner": isgd.inner(leaf, tree[name]),
            }
            for name, leaf in grads.items()
        }
        return grads, of

    grads, of = jax.jit(asked)(params, batch)
    return grads, of, jax.jit(isgd.stacked_per_example_grads(loss_fn))(params, batch)


def each_grad(programs: dict[str, Any], batch: Any, grad: Any = None) -> dict[str, np.ndarray]:
    """One `jax.grad` an example."""
    params, grad = params_of(programs, batch), grad or jax.jit(jax.grad(loss_of(programs)))
    host = jax.tree.map(np.asarray, batch)
    rows = [grad(params, jax.tree.map(lambda x, n=n: x[n], host)) for n in range(B)]
    return {name: np.stack([np.asarray(row[name]).astype(np.complex128) for row in rows]) for name in programs}


def errors(found: dict[str, Any], right: np.ndarray) -> dict[str, float]:
    """Of each question, the largest error, relative to the largest answer that its factors could give."""
    flat = right.reshape(B, -1)
    norms, tree = (
        np.linalg.norm(flat, axis=1),
        (1 + 2j if np.iscomplexobj(found["stack"]) else 1) * np.ones(flat.shape[1]),
    )
    size = norms.max()
    wanted = {
        "norms": (norms, size),
        "mean": (right.mean(0), np.abs(right).max()),
        "stack": (right, np.abs(right).max()),
        "gram": ((flat @ flat.conj().T).real, size**2),
        "inner": ((flat.conj() @ tree).real, size * np.linalg.norm(tree)),
    }
    wide = {name: np.asarray(value).astype(np.complex128) for name, value in found.items()}
    return {name: float(np.abs(wide[name] - answer).max() / scale) for name, (answer, scale) in wanted.items()}


def of_stacked(stacked: np.ndarray, right: np.ndarray) -> float:
    """The error of the definition in the program's own type."""
    return float(np.abs(np.asarray(stacked).astype(np.complex128) - right).max() / np.abs(right).max())


def programs_of(name: str) -> dict[str, Any]:
    return {**REAL, **COMPLEX} if name.startswith("complex") else {**REAL, **WIDER} if name == "float32" else REAL


WIDE = ("float64", "complex128")


@functools.cache
def asked_of(name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """What is asked of all programs in a type, once for all tests."""
    with jax.enable_x64(True) if name in WIDE else contextlib.nullcontext():
        return ask(programs_of(name), jax.tree.map(jnp.asarray, factors(jnp.dtype(name))))


@functools.cache
def widest(name: str) -> tuple[Any, dict[str, Any], Any]:
    """The widest type of a kind, the programs of all its types, and their gradient in it: one program for all."""
    programs = programs_of(name)
    return np.result_type(name, np.float64), programs, jax.jit(jax.grad(loss_of(programs)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTH)
def test_each_rule_agrees_with_one_float64_gradient_an_example(name):
    dtype, programs, grad = widest("complex64" if name.startswith("complex") else "float32")
    with jax.enable_x64(True):
        held = jax.tree.map(lambda x: jnp.asarray(x.astype(dtype)), factors(jnp.dtype(name)))
        right = each_grad(programs, held, grad)
    _, found, stacked = asked_of(name)
    wrong = {}
    for case, answers in found.items():
        allowed = max(4 * of_stacked(stacked[case], right[case]), 4e-3 if "16" in case else SMOOTH[name])
        wrong.update(
            {(case, what): (e, allowed) for what, e in errors(answers, right[case]).items() if not e <= allowed}
        )
    assert not wrong


@pytest.mark.slow
def test_what_is_not_linear_is_as_one_gradient_an_example():
    batch = jax.tree.map(jnp.asarray, factors(np.float32))
    asked = {case: program for case, program in EXACTLY.items() if multiplies_integers() or "int" not in case}
    grads, found, _ = ask(asked, batch)
    right = each_grad(asked, batch)
    wrong = {case: errors(found[case], right[case]) for case in asked}
    assert not {case: found for case, found in wrong.items() if not max(found.values()) <= 1e-6}
    lazy = {case for case, leaf in grads.items() if is_factored(leaf)}
    assert lazy == asked.keys() & {"int8 to float32", "int8, negated", "int8, moved about", "uint8", "of eight bits"}


def test_a_loop_whose_steps_are_all_alike_counts_every_step():
    assert_exact({
        "carried": lambda x, y: lax.scan(lambda c, _: (c + dot(x, y), None), jnp.zeros((I, O)), None, length=3)[0],
        "stacked": lambda x, y: lax.scan(lambda _, __: (None, dot(x, y)), None, None, length=3)[1],
    })  # fmt: skip


def test_rows_by_index_beside_zeros_add_nothing_to_them():
    def padded(x, y):
        layers = lax.scan(lambda _, __: (None, rows_by_index(x, y)), None, None, length=2)[1]
        return lax.pad(layers, np.zeros((), y.dtype), ((1, 0, 0), (0, 0, 0), (0, 0, 0)))

    assert_exact({"padded": padded})


def assert_exact(programs: dict[str, Any]) -> None:
    """What is asked of lazy gradients, which these are, is that of one `jax.grad` an example, in float32."""
    batch = jax.tree.map(jnp.asarray, factors(np.float32))
    grads, found, _ = ask(programs, batch)
    right = each_grad(programs, batch)
    assert all(map(is_factored, grads.values()))
    assert max(error for case in programs for error in errors(found[case], right[case]).values()) <= 1e-6


def multiplies_integers() -> bool:
    """Whether XLA does: on an H100 its products of int8 in int32 are wrong for sizes that are no multiples of 4."""
    x, y = (np.random.default_rng(at).integers(-99, 99, (6, size)).astype(np.int8) for at, size in ((0, 5), (1, 7)))
    found = lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return np.array_equal(found, x.astype(np.int32).T @ y) or jax.default_backend() == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float32", "complex64"])
def test_rules_do_cut(name):
    """A rule that formed everything would agree as well."""
    grads, _, _ = asked_of(name)
    assert {case for case, leaf in grads.items() if not is_factored(leaf)} <= {"fft", "imag, of the other"}


def primitives(jaxpr: Any) -> set[str]:
    """Names of all primitives of a program, those of its inner programs included."""
    found = {eqn.primitive.name for eqn in jaxpr.eqns}
    return found.union(*(primitives(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params)))


def each_device_s_own(x: jax.Array) -> jax.Array:
    one = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    mapped = jax.shard_map(
        lambda x: x + jnp.ones(2), mesh=one, in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d")
    )
    return mapped(x)


def test_no_rule_is_without_a_case():
    one = {name: jnp.asarray(x[0]) for name, x in factors(np.complex64).items()}
    real = jax.tree.map(jnp.real, one)
    used: set[str] = set()
    for programs, example in ((REAL, real), (WIDER, real), (EXACTLY, real), (COMPLEX, one)):
        for program in programs.values():
            used |= primitives(jax.make_jaxpr(program)(example["x"], example["y"]).jaxpr)
    used |= primitives(jax.make_jaxpr(each_device_s_own)(jnp.zeros(2)).jaxpr)  # test_sharded_parameters.py holds it
    assert set(RULES) - used <= {"copy_p", "add_any", "expand_dims"}, "no case reaches these rules"


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 40])
def test_norms_are_right_wherever_they_are_numbers_of_float32(rows):
    """Squares leave float32 long before norms do: by outer products, by pairs of rows, by products, and formed."""
    random = np.random.default_rng(1)
    x, y = random.normal(size=(B, rows, 64)), random.normal(size=(B, rows, 96))
    programs = {
        "dot": dot,
        "twice": lambda x, y: dot(x, y) + dot(x[::-1], y),
        "formed": lambda x, y: jnp.sin(x[0]) * y[0, 0],
    }
    ask = norms_asked(programs, {"x": x, "y": y})
    for scale in (1e-36, 1e-22, 1e-19, 1e19, 1e30):
        for left, right in ((1, scale), (np.sqrt(scale), np.sqrt(scale)), (scale, 1)):
            found, stacked = ask({"x": np.float32(x * left), "y": np.float32(y * right)})
            for case in programs:
                exact = np.linalg.norm(np.asarray(stacked[case], np.float64).reshape(B, -1), axis=1)
                np.testing.assert_allclose(found[case], exact, rtol=2e-5, err_msg=f"{case}, {left:.0e} x {right:.0e}")


def norms_asked(programs: dict[str, Any], like: Any) -> Any:
    """A function of a batch: norms of each parameter's gradients, and the stacked ones."""
    params, loss_fn = params_of(programs, jax.tree.map(np.float32, like)), loss_of(programs)

    @jax.jit
    def asked(batch: Any) -> Any:
        grads = isgd.per_example_grads(loss_fn, joint=False)(params, batch)
        stacked = isgd.stacked_per_example_grads(loss_fn)(params, batch)
        return {name: isgd.norms(leaf) for name, leaf in grads.items()}, stacked

    return asked


def test_an_example_without_a_gradient_costs_no_second_pass():
    """A gradient of zero, or tiny beside others, is no reason to form the products of all examples."""
    params = jnp.zeros((64, 96))
    batch = {"x": jnp.ones((B, 40, 64)).at[1].set(0), "y": jnp.full((B, 40, 96), 1e-25).at[2].set(0)}
    grads = isgd.per_example_grads(loss_of({"w": dot}), joint=False)({"w": params}, batch)
    assert not has_cancelled(gram_squares(grads["w"].terms, None)).any()
    np.testing.assert_allclose(isgd.norms(grads), [40 * 1e-25 * np.sqrt(64 * 96), 0, 0], rtol=1e-5)
