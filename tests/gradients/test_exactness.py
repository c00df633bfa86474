"""How exact norms are: where Gram sums cancel, in float64, in bf16."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import isgd_jax as isgd
from isgd_jax.engines import scorers
from isgd_jax.gradients import costs, lazy, squares
from isgd_jax.gradients.lazy import scaled_norms
from isgd_jax.gradients.leaf import Factored, how_squared
from isgd_jax.gradients.terms import Outer


def sequence_loss(w, x):
    return jnp.sum(jnp.sin(x @ w) ** 2)


def outer(left, right):
    i, o = left.shape[-1], right.shape[-1]
    return Factored((Outer(left[:, None], right[:, None], ((i, "i"), (o, "o"))),), (i, o), left.dtype)


def norms_of(leaf):
    """In one program, traced anew."""
    return jax.jit(lambda leaf: isgd.norms(leaf))(leaf)


def formed_norms(left, right):
    product = np.einsum("bti,bto->bio", np.asarray(left, np.float64), np.asarray(right, np.float64))
    return np.linalg.norm(product.reshape(len(product), -1), axis=1)


def cancelling(key, b=4, t=32, i=64, o=96):
    """Rows that hardly differ, times slopes that sum to zero: where Gram sums cancel."""
    one, two = jax.random.split(key)
    left = 1 + 1e-3 * jax.random.normal(one, (b, t, i))
    right = jax.random.normal(two, (b, t, o))
    return left, right - jnp.mean(right, axis=1, keepdims=True)


@pytest.mark.parametrize("ratio", [1e-15, 1e-20])
def test_a_convolution_whose_slopes_lie_where_its_image_is_small_has_its_norm(ratio, monkeypatch):
    monkeypatch.setattr(costs, "machine", lambda: costs.CPU)
    rng = np.random.default_rng(0)
    image, slopes = rng.normal(size=(1, 16, 64)), rng.normal(size=(1, 14, 64))
    image[:, 8:] *= ratio
    slopes[:, :8] = 0

    def loss(w, example):
        layout = ("NWC", "WIO", "NWC")
        out = jax.lax.conv_general_dilated(example["x"][None], w, (1,), "VALID", dimension_numbers=layout)
        return jnp.sum(example["c"] * out[0])

    w, batch = jnp.zeros((3, 64, 64)), {"x": jnp.asarray(image, jnp.float32), "c": jnp.asarray(slopes, jnp.float32)}
    exact = oracle.norms(loss, w, batch)
    np.testing.assert_allclose(isgd.norms(isgd.per_example_grads(loss, joint=False)(w, batch)), exact, rtol=1e-5)
    np.testing.assert_allclose(scorers.grad_norm(loss)(w, batch), exact, rtol=1e-5)


@pytest.mark.slow
def test_norms_are_exact_where_the_gram_sum_cancels(key, monkeypatch):
    monkeypatch.setattr(costs, "machine", lambda: costs.CPU)  # others form these products
    left, right = cancelling(key)
    leaf = outer(left, right)
    assert how_squared(leaf) == "Gram"
    expected = formed_norms(left, right)
    np.testing.assert_allclose(norms_of(leaf), expected, rtol=2e-5)
    monkeypatch.setattr(squares, "_RISK", 0.0)  # without the guard the trap is real
    assert np.max(np.abs(norms_of(leaf) / expected - 1)) > 1e-3


def test_inner_products_of_all_pairs_are_exact_where_sums_over_rows_cancel(key, monkeypatch):
    """To 2e-5 of the two norms, and so are those of the means of the halves of a batch."""
    monkeypatch.setattr(costs, "prefers_batch_gram", lambda terms: True)
    monkeypatch.setattr(costs, "prefers_gram_of_means", lambda terms: True)
    left, right = cancelling(key)
    leaf = outer(left, right)
    each = np.einsum("bti,bto->bio", np.asarray(left, np.float64), np.asarray(right, np.float64)).reshape(4, -1)
    lengths = np.linalg.norm(each, axis=1)

    def errors():
        pairs, (between, whole) = jax.jit(lambda leaf: (isgd.gram(leaf), lazy.halves(leaf, jnp.ones(4))))(leaf)
        first, second, mean = each[:2].mean(0), each[2:].mean(0), each.mean(0)
        near = np.array([between - first @ second, whole - mean @ mean]) / lengths.mean() ** 2
        return np.max(np.abs((pairs - each @ each.T) / np.outer(lengths, lengths))), np.max(np.abs(near))

    assert max(errors()) < 2e-5
    monkeypatch.setattr(squares, "_RISK", 0.0)  # without the guard the trap is real
    assert min(errors()) > 2e-4


@pytest.mark.parametrize(("left", "right"), [(-30, -7), (-7, -30), (25, 12), (-37, 37), (0, -30)])
def test_single_rows_of_any_size_have_their_norm(key, left, right):
    """Powers of ten whose squares are no float32, though the norm is one; two products an example, one small."""
    one, two = jax.random.split(key)
    x = jax.random.normal(one, (3, 2, 5)) * jnp.float32(10.0**left) * jnp.array([[[1], [1e-3]]])
    slopes = jax.random.normal(two, (3, 2, 4)) * jnp.float32(10.0**right)
    expected = np.linalg.norm(np.einsum("bki,bko->bkio", x, slopes, dtype=np.float64).reshape(3, -1), axis=1)

    def loss_fn(w, example):
        return jnp.einsum("ki,kio,ko->", example["x"], w, example["slopes"])

    grads = isgd.per_example_grads(loss_fn)(jnp.zeros((2, 5, 4)), {"x": x, "slopes": slopes})
    assert grads.terms[0].right.shape == (3, 2, 1, 4)
    np.testing.assert_allclose(isgd.norms(grads), expected, rtol=1e-6)
    single = outer(x[:, :1], slopes[:, :1])
    expected = np.linalg.norm(np.float64(x[:, 0]), axis=1) * np.linalg.norm(np.float64(slopes[:, 0]), axis=1)
    np.testing.assert_allclose(isgd.norms(single), expected, rtol=1e-6)


def test_norms_take_no_sine_a_second_time():
    """Where an activation is laid out anew for its norm, XLA computes it anew: twice the sines of a SIREN."""
    params = {"w": [jnp.ones((64, 64))] * 3, "b": [jnp.zeros(64)] * 3}

    def loss_fn(params, x):
        for w, b in zip(params["w"], params["b"], strict=True):
            x = jnp.sin(x @ w + b)
        return jnp.sum(x)

    def ordinary(params, xs):
        return jax.value_and_grad(lambda p: jnp.mean(jax.vmap(loss_fn, (None, 0))(p, xs)))(params)

    xs = jnp.ones((256, 64))
    ours, theirs = (jax.jit(f).lower(params, xs).compile().as_text() for f in (scorers.grad_norm(loss_fn), ordinary))
    assert ours.count(" sine(") <= theirs.count(" sine(")


@pytest.mark.slow
def test_norms_of_gradients_that_vanish_are_zero_and_not_nan():
    leaf = outer(jnp.ones((2, 32, 64)), jnp.stack([jnp.ones((32, 96)), jnp.ones((32, 96))]).at[:, ::2].set(-1))
    np.testing.assert_array_equal(norms_of(leaf), [0, 0])
    assert np.all(np.isfinite(norms_of(outer(jnp.zeros((2, 32, 64)), jnp.zeros((2, 32, 96))))))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e25])
def test_norms_of_gradients_that_the_compiler_knows_are_those_of_others(size):
    """Constants over a power of two, squared: XLA squares constant and power apart, 0 times infinity."""

    def known(params, x):
        terms = size * jnp.sum(params["w"] @ jnp.ones((2, 3))), size * jnp.sum(params["v"] @ jnp.ones(2))
        return sum(terms) + size * jnp.sum(jnp.sort(params["b"])) + 0 * jnp.sum(x)

    params, x = {"w": jnp.ones((4, 2)), "v": jnp.ones((4, 2)), "b": jnp.ones(2)}, jnp.ones((3, 2))

    def asked():
        grads = isgd.per_example_grads(known)(params, x)
        formed = jnp.full((3, 4, 2), size), jnp.full((3, 1), size)
        scale = jax.tree.map(jnp.ones_like, params)
        return isgd.norms(grads), scaled_norms(grads, scale), isgd.norms(formed), isgd.norms(formed[1] * 1j)

    for found, square in zip(jax.jit(asked)(), (72 + 8 + 2, 72 + 8 + 2, 9, 1), strict=True):
        np.testing.assert_allclose(found, np.full(3, size * np.sqrt(square)), rtol=1e-6)


def test_nan_in_one_example_stays_there(key):
    left, right = jax.random.normal(key, (3, 32, 64)), jax.random.normal(key, (3, 32, 96))
    norms = norms_of(outer(left.at[1, 0, 0].set(jnp.nan), right))
    np.testing.assert_array_equal(np.isnan(norms), [False, True, False])


@pytest.mark.slow
def test_float64_to_twelve_digits(key):
    with jax.enable_x64(True):
        x = jax.random.normal(key, (3, 32, 16), jnp.float64)
        w = jax.random.normal(key, (16, 24), jnp.float64)
        norms = jax.jit(lambda w, x: isgd.norms(isgd.per_example_grads(sequence_loss, joint=False)(w, x)))(w, x)
        expected = oracle.norms(sequence_loss, w, x)
        assert norms.dtype == jnp.float64
        np.testing.assert_allclose(norms, expected, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 32])
def test_bfloat16_compute_to_two_digits_of_float64(key, rows):
    x, w = jax.random.normal(key, (5, rows, 16)), jax.random.normal(key, (16, 24)) / 4

    def rounded(w, x):
        return jnp.sum(jnp.square((x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)))

    def exact(w, x):
        return jnp.sum(jnp.square(x @ w))

    norms = jax.jit(scorers.grad_norm(rounded))(w, x)
    assert norms.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in (w, x)]
        expected = oracle.norms(exact, *wide)
    np.testing.assert_allclose(norms, expected, rtol=1e-2)


def test_contractions_have_the_precision_of_the_program_unless_told():
    grads = outer(jnp.ones((2, 8, 64)), jnp.ones((2, 8, 96)))

    def asked(**how):
        return str(jax.make_jaxpr(lambda g: isgd.norms(g, **how))(grads))

    with jax.default_matmul_precision(None):
        assert "Precision." not in asked()
    assert "Precision.HIGH," in asked(precision=jax.lax.Precision.HIGH)
    with jax.default_matmul_precision("highest"):
        assert "Precision.HIGHEST" in asked()


@pytest.mark.slow
def test_the_scorer_does_it_over_where_the_gram_sum_cancels(key, monkeypatch):
    monkeypatch.setattr(costs, "machine", lambda: costs.CPU)
    left, right = cancelling(key, b=11)

    def loss_fn(w, example):
        return jnp.sum((example["left"] @ w) * example["right"])

    batch, expected = {"left": left, "right": right}, formed_norms(left, right)
    score = scorers.grad_norm(loss_fn)
    np.testing.assert_allclose(jax.jit(score)(jnp.zeros((64, 96)), batch), expected, rtol=2e-5)
    monkeypatch.setattr(squares, "_RISK", 0.0)
    careless = scorers.grad_norm(loss_fn)  # another one: what was traced is kept
    assert np.max(np.abs(jax.jit(careless)(jnp.zeros((64, 96)), batch) / expected - 1)) > 1e-3


def unused_layer(w, x):
    stacked = jnp.stack(w)
    for layer in (0, 1):
        x = jnp.tanh(x @ stacked[layer])
    return jnp.sum(x)


def rows_cut_away(w, x):
    return jnp.sum(jnp.sin(x @ jnp.concatenate(w, 0)[:4]))


def masked_far_rows(w, x):
    """Padding with any number in it, however large, whose losses do not count."""
    far = jnp.where(jnp.arange(x.shape[0])[:, None] < 2, x, 1e25)
    return jnp.sum(jnp.where(jnp.arange(x.shape[0])[:, None] < 2, far @ w[0], 0.0))


@pytest.mark.parametrize("loss_fn", [unused_layer, rows_cut_away, masked_far_rows])
def test_factors_that_are_zero_or_masked_are_no_reason_for_nan(loss_fn):
    """Constants are multiplied when the program is compiled: 2^125 times 2^125 times a row of zeros would be NaN."""
    random = np.random.default_rng(0)
    params = [jnp.asarray(random.normal(size=(4, 4)), jnp.float32) for _ in range(3)]
    batch = jnp.asarray(random.normal(size=(5, 3, 4)), jnp.float32)
    expected = oracle.norms(loss_fn, params, batch)
    for joint in (True, False):
        ask = jax.jit(lambda p, b, joint=joint: isgd.norms(isgd.per_example_grads(loss_fn, joint=joint)(p, b)))
        np.testing.assert_allclose(ask(params, batch), expected, rtol=2e-6)


def test_a_gram_sum_that_is_no_number_is_done_over():
    known = squares.Squares(jnp.ones(3), jnp.array([1.0, jnp.nan, 0.0]), jnp.array([1.0, 1.0, 0.0]))
    np.testing.assert_array_equal(squares.has_cancelled(known), [False, True, False])


EXTREMES = {
    "usual": 1.0,
    "small": 1e-15,
    "tiny": 1e-25,
    "large": 1e12,
    "huge": 1e30,
    "zero": 0.0,
    "a NaN": np.nan,
    "infinite": np.inf,
}
"""What one row of large arrays is multiplied by; of "usual", none."""


@pytest.mark.parametrize("factor", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
@pytest.mark.parametrize("is_slopes", [False, True], ids=["rows", "slopes"])
def test_many_squares_are_scaled_only_where_they_leave_their_type_and_are_the_same_bits(
    factor, dtype, is_slopes, monkeypatch
):
    """In turn, one row among others is out of range: all are then summed over their scales."""
    shape = (16, squares.MANY // 16)
    with jax.enable_x64(dtype == "float64"):
        rows = jax.random.normal(jax.random.key(0), shape, dtype) * 10.0 ** jnp.arange(-8, 8)[:, None].astype(dtype)
        rows = rows.at[3].set(rows[3] * jnp.asarray(factor, dtype))
        found = jax.jit(lambda x: squares.root(squares.sum_squares(x, is_slopes=is_slopes)))(rows)
        with monkeypatch.context() as always:
            always.setattr(squares, "MANY", rows.size + 1)
            expected = jax.jit(lambda x: squares.root(squares.sum_squares(x, is_slopes=is_slopes)))(rows)
        assert found.dtype == jnp.finfo(dtype).dtype
        wide = np.asarray(rows, np.complex128 if dtype == "complex64" else np.float64)
    np.testing.assert_array_equal(found, expected)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found, np.linalg.norm(wide, axis=1), rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
def test_squares_of_several_arrays_share_one_condition_and_keep_their_bits(scale):
    """Whichever of them is out of range, all have the numbers that each has by itself."""
    shapes = [(8, squares.MANY // 8), (8, squares.MANY // 4), (8, 2, squares.MANY)]
    arrays = [jax.random.normal(jax.random.key(at), shape) for at, shape in enumerate(shapes)]
    arrays[1] *= scale
    parts = [
        squares.Rows(x, lead, is_slopes=at == 1) for at, (x, lead) in enumerate(zip(arrays, (1, 1, 2), strict=True))
    ]

    def together(arrays):
        asked = [part._replace(array=x) for part, x in zip(parts, arrays, strict=True)]
        return [found.scale * jnp.sqrt(found.values) for found in squares.sums_of_squares(asked)]

    assert str(jax.make_jaxpr(together)(arrays)).count("cond[") == 1
    for found, part in zip(jax.jit(together)(arrays), parts, strict=True):
        expected = np.linalg.norm(np.asarray(part.array, np.float64), axis=-1)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        alone = jax.jit(lambda x, part=part: squares.sum_squares(x, part.lead, is_slopes=part.is_slopes))(part.array)
        np.testing.assert_array_equal(found, alone.scale * jnp.sqrt(alone.values))


def test_norms_of_a_plain_network_ask_one_condition():
    params = {"w": jnp.ones((64, 64)) / 64, "b": jnp.zeros(64), "v": jnp.ones((64, 64)) / 64, "c": jnp.zeros(64)}
    batch = jax.random.normal(jax.random.key(0), (squares.MANY // 64, 64))

    def loss_fn(p, x):
        return jnp.sum(jnp.square(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]))

    program = jax.make_jaxpr(lambda p, b: isgd.norms(isgd.per_example_grads(loss_fn)(p, b)))(params, batch)
    assert str(program).count("cond[") == 1
    np.testing.assert_allclose(
        isgd.norms(isgd.per_example_grads(loss_fn)(params, batch)), oracle.norms(loss_fn, params, batch), rtol=2e-6
    )


def test_many_squares_under_vmap_and_within_shard_map_are_those_of_each_row():
    rows = jax.random.normal(jax.random.key(0), (8, 8, squares.MANY // 8)).at[2, 1].multiply(1e-30)

    def norms_of(x):
        return squares.root(squares.sum_squares(x))

    expected = np.linalg.norm(np.asarray(rows, np.float64), axis=2)
    np.testing.assert_allclose(jax.jit(jax.vmap(norms_of))(rows), expected, rtol=1e-6)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    split = jax.sharding.PartitionSpec("data")
    one = jnp.concatenate([rows[:, 0]] * 4)
    with jax.set_mesh(mesh):
        apart = jax.jit(jax.shard_map(norms_of, in_specs=split, out_specs=split))
        np.testing.assert_allclose(apart(jax.reshard(one, split)), np.tile(expected[:, 0], 4), rtol=1e-6)
