"""Data sets of arrays and sources: one checked record in memory; every failure one sentence."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax import data
from isgd_jax.data.dataset import fingerprint, read


def arrays(n=6, **more):
    return {"image": np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2, 1), "label": np.arange(n) % 3} | more


def test_rows_types_and_statistics_of_arrays():
    made = data.from_arrays(arrays(), arrays(3))
    assert (made.input_key, made.num_classes, len(made), made.valid) == ("image", 3, 6, None)
    assert made.train["image"].dtype == np.uint8
    assert made.train["label"].dtype == np.int32
    pixels = np.arange(24)
    np.testing.assert_allclose((made.mean, made.std), (pixels.mean(), pixels.std()), rtol=1e-6)


def test_sixty_four_bits_become_thirty_two():
    made = data.from_arrays(
        *[{"x": np.ones([2, 3]), "label": np.array([0, 1]), "age": np.array([7, 8])}] * 2, input_key="x"
    )
    assert {key: array.dtype for key, array in made.train.items()} == {
        "x": np.float32,
        "label": np.int32,
        "age": np.int32,
    }


def test_standardise_gives_mean_zero_and_deviation_one_inside_jax():
    made = data.from_arrays(arrays(), arrays())
    inputs = made.standardise(jnp.asarray(made.train["image"]))
    assert inputs.dtype == jnp.float32
    np.testing.assert_allclose((inputs.mean(), inputs.std()), (0, 1), atol=1e-6)


def test_per_coordinate_statistics_and_constant_coordinates():
    images = np.stack([np.full(5, 7), np.arange(5)], 1).astype(np.uint8)
    made = data.from_arrays(*[{"image": images, "label": np.zeros(5, int)}] * 2, per_coordinate=True)
    np.testing.assert_allclose(made.mean, [7, 2])
    np.testing.assert_allclose(made.std, [1, np.sqrt(2)], rtol=1e-6)  # the constant one is not divided by zero


@pytest.mark.parametrize("constant", [0.1, 0.0, 1e30])
def test_a_constant_is_not_divided_by_its_rounding(constant):
    made = data.from_arrays(*[{"x": np.full([1001, 1], constant), "label": np.zeros(1001, int)}] * 2)
    assert made.std == 1


def test_statistics_do_not_cancel():
    features = np.random.default_rng(0).normal(1e4, 0.5, [9000, 2]).astype(np.float32)
    made = data.from_arrays(*[{"x": features, "label": np.zeros(9000, int)}] * 2, per_coordinate=True)
    np.testing.assert_allclose(made.std, features.astype(np.float64).std(0), rtol=1e-6)


def test_fingerprint_knows_content_order_type_and_shape():
    made = arrays()
    prints = [
        made,
        {key: array[::-1] for key, array in made.items()},
        made | {"label": made["label"].astype(np.int8)},
        made | {"image": made["image"].reshape(6, 4)},
        made | {"image": made["image"] + np.uint8(1)},
    ]
    assert len({fingerprint(each) for each in prints}) == 5
    assert fingerprint(made) == fingerprint({key: made[key].copy() for key in reversed(made)})


def test_fingerprint_is_of_the_training_examples_alone():
    assert data.from_arrays(arrays(), arrays(3)).fingerprint == data.from_arrays(arrays(), arrays(5)).fingerprint


class Source:
    """A source as users write them: no more than is asked."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitems__(self, indices):
        return [self.items[index] for index in indices]


def source(n=6):
    rows = arrays(n)
    return Source([{"image": rows["image"][i], "label": int(rows["label"][i])} for i in range(n)])


def test_a_source_is_read_whole_and_in_order():
    made = data.from_source(source(5000), source(3), name="mine")
    assert made.name == "mine"
    assert made.fingerprint == data.from_arrays(arrays(5000), arrays(3)).fingerprint


@pytest.mark.parametrize(
    ("train", "options", "error", "message"),
    [
        (arrays(label=np.arange(5)), {}, ValueError, "arrays of one length, got {'image': 6, 'label': 5}"),
        (arrays(0), {}, ValueError, "at least one example"),
        ({"image": np.zeros([2, 2])}, {}, TypeError, "a dict with 'label'"),
        (arrays(label=np.array([0, 1, 2, 3, 4, -1])), {}, ValueError, "labels from 0 to 4, got -1 to 4"),
        (arrays(), {"num_classes": 2}, ValueError, "labels from 0 to 1, got 0 to 2"),
        (arrays(label=np.zeros(6)), {}, TypeError, "integer labels"),
        (arrays(label=np.array(["cat"] * 6)), {}, TypeError, "array of numbers"),
        (arrays(image=np.full([6, 2], np.nan)), {}, ValueError, "finite numbers"),
        (arrays(ids=np.arange(6) + 2**40), {"input_key": "image"}, ValueError, "int32 can hold"),
        (arrays(weight=np.ones(6)), {}, ValueError, "name the model's input with input_key"),
        (arrays(), {"input_key": "picture"}, ValueError, "expected the input 'picture'"),
    ],
)
def test_wrong_arrays_are_told(train, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        data.from_arrays(train, train, **options)


def test_numbers_beyond_float32_are_told():
    huge = arrays(image=np.full([6, 2], 1e300))
    with pytest.raises(ValueError, match="more than float32 can hold"):
        data.from_arrays(huge, huge)


def test_nobody_changes_the_examples_through_the_data_set():
    mine = arrays()
    made = data.from_arrays(mine, mine)
    with pytest.raises(ValueError, match="read-only"):
        made.train["image"][0] = 1
    mine["image"][0] = 1  # the caller's own arrays stay theirs


def test_test_examples_unlike_the_training_ones_are_told():
    with pytest.raises(ValueError, match=r"test: expected the keys, types and shapes of train"):
        data.from_arrays(arrays(), arrays(image=np.zeros([6, 3])))


def test_a_source_that_gives_too_few_items_is_told():
    class Short(Source):
        def __getitems__(self, indices):
            return super().__getitems__(indices[1:])

    with pytest.raises(ValueError, match="the 6 items it was asked for, got 5"):
        read(Short(source().items))


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        ([1, 2], TypeError, "an object with __len__ and __getitems__, got list"),
        (Source([]), ValueError, "empty"),
        (Source([1, 2]), TypeError, "dicts of arrays, got int"),
        (Source([{"image": np.zeros(2)}, {"image": np.zeros(3)}]), ValueError, "the same shapes"),
        (Source([{"image": np.zeros(2)}, {}]), ValueError, "the same keys"),
    ],
)
def test_wrong_sources_are_told(train, error, message):
    with pytest.raises(error, match=message):
        read(train)
