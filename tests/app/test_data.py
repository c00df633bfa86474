"""Data sets of arrays and sources: one checked record in memory; every failure one sentence."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax.app import data
from isgd_jax.app.data.checks import class_count
from isgd_jax.app.data.dataset import fingerprint
from isgd_jax.app.data.sources import read


def arrays(n=6, **more):
    return {"image": np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2, 1), "label": np.arange(n) % 3} | more


def test_rows_types_and_statistics_of_arrays():
    made = data.from_arrays(arrays(), arrays(3))
    assert (made.input_key, made.num_classes, len(made), made.valid) == ("image", 3, 6, None)
    assert made.train["image"].dtype == np.uint8
    assert made.train["label"].dtype == np.int32
    pixels = np.arange(24)
    np.testing.assert_allclose(made.statistics["image"], (pixels.mean(), pixels.std()), rtol=1e-6)


def test_sixty_four_bits_become_thirty_two():
    made = data.from_arrays(
        *[{"x": np.ones([2, 3]), "label": np.array([0, 1]), "age": np.array([7, 8])}] * 2, input_key="x"
    )
    assert {key: array.dtype for key, array in made.train.items()} == {
        "x": np.float32,
        "label": np.int32,
        "age": np.int32,
    }


def test_standardizing_gives_mean_zero_and_deviation_one_inside_jax():
    made = data.from_arrays(arrays(), arrays())
    inputs = made.standardize(jnp.asarray(made.train["image"]))
    assert inputs.dtype == jnp.float32
    np.testing.assert_allclose((inputs.mean(), inputs.std()), (0, 1), atol=1e-6)


def test_per_coordinate_statistics_and_constant_coordinates():
    images = np.stack([np.full(5, 7), np.arange(5)], 1).astype(np.uint8)
    made = data.from_arrays(*[{"image": images, "label": np.zeros(5, int)}] * 2, per_coordinate=True)
    mean, std = made.statistics["image"]
    np.testing.assert_allclose(mean, [7, 2])
    np.testing.assert_allclose(std, [1, np.sqrt(2)], rtol=1e-6)  # the constant one is not divided by zero


@pytest.mark.parametrize("constant", [0.1, 0.0, 1e30])
def test_a_constant_is_not_divided_by_its_rounding(constant):
    made = data.from_arrays(*[{"x": np.full([1001, 1], constant), "label": np.zeros(1001, int)}] * 2)
    assert made.statistics["x"].std == 1


def test_statistics_do_not_cancel():
    features = np.random.default_rng(0).normal(1e4, 0.5, [9000, 2]).astype(np.float32)
    made = data.from_arrays(*[{"x": features, "label": np.zeros(9000, int)}] * 2, per_coordinate=True)
    np.testing.assert_allclose(made.statistics["x"].std, features.astype(np.float64).std(0), rtol=1e-6)


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
        (arrays(label=np.array([0, 1, 2, 3, 4, -1])), {}, ValueError, "labels from 0 to 4, got -1 to 4"),
        (arrays(), {"num_classes": 2}, ValueError, "labels from 0 to 1, got 0 to 2"),
        (arrays(label=np.array(["cat"] * 6)), {}, TypeError, "array of numbers"),
        (arrays(image=np.full([6, 2], np.nan)), {}, ValueError, "finite numbers"),
        (arrays(ids=np.arange(6) + 2**40), {"input_key": "image"}, ValueError, "int32 can hold"),
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


def test_zero_columns_are_told():
    with pytest.raises(ValueError, match=r"train\['x'\]: expected at least one number .* got the shape \(6, 0\)"):
        data.from_arrays(*[{"x": np.ones([6, 0]), "label": np.arange(6)}] * 2)


def test_masked_arrays_are_told_with_the_cure():
    masked = np.ma.masked_array(np.ones([6, 2]), mask=np.eye(6, 2, dtype=bool))
    with pytest.raises(TypeError, match=r"test\['image'\]: .* got a masked one; say what to put: .filled\(value\)"):
        data.from_arrays(arrays(image=masked.filled(0)), arrays(image=masked))


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i2", ">i8", "<f4"])
def test_any_byte_order_is_converted(dtype):
    features = np.arange(12.0).reshape(6, 2)
    made = data.from_arrays(*[{"x": features.astype(dtype), "label": np.arange(6).astype(">u2")}] * 2)
    assert made.train["x"].dtype.isnative
    np.testing.assert_array_equal(jnp.asarray(made.train["x"]), features)
    native = data.from_arrays(*[{"x": made.train["x"], "label": np.arange(6)}] * 2)
    assert native.fingerprint == made.fingerprint


@pytest.mark.parametrize(
    ("dtype", "named"),
    [
        (np.longdouble, r"astype\(np.float32\)"),
        (np.complex64, "complex64"),
        ("m8[s]", r"timedelta64\[s\]"),
        ("M8[s]", r"datetime64\[s\]"),
        (object, "object"),
        ("S3", r"\|S3"),
        ([("a", "f4")], "a"),
    ],
)
def test_types_that_are_no_inputs_are_named(dtype, named):
    odd = arrays(image=np.zeros([6, 2], np.int64).astype(dtype))
    with pytest.raises(TypeError, match=rf"train\['image'\]: expected an array of numbers.*{named}"):
        data.from_arrays(odd, odd)


def test_nested_dicts_are_told():
    nested = arrays(image={"left": np.ones([6, 2])})
    with pytest.raises(TypeError, match="got a dict; a split is a flat dict"):
        data.from_arrays(nested, nested)


def test_bfloat16_is_an_input():
    features = jnp.asarray([[1.0, 5.0], [3.0, 5.0]], jnp.bfloat16)
    made = data.from_arrays(*[{"x": features, "label": np.arange(2)}] * 2)
    mean, std = made.statistics["x"]
    assert (mean.tolist(), std.tolist()) == ([2, 5], [1, 1])
    assert made.train["x"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(made.standardize(features), [[-1, 0], [1, 0]])
    bad = {"x": features.at[0, 0].set(jnp.inf), "label": np.arange(2)}
    with pytest.raises(ValueError, match="finite numbers"):
        data.from_arrays(bad, bad)


def test_labels_beyond_int32_are_told_by_their_own_value():
    large = arrays(label=np.array([0, 1, 2, 3, 4, 2**32 - 1], np.uint32))
    with pytest.raises(ValueError, match="got 0 to 4294967295"):
        data.from_arrays(large, large)
    most = arrays(label=np.array([0, 1, 2, 3, 4, 2**31 - 1]))
    with pytest.raises(ValueError, match="number classes from 0, got one of 2147483647"):
        data.from_arrays(most, most)


@pytest.mark.parametrize(("given", "error"), [(3.0, TypeError), (True, TypeError), ("3", TypeError), (0, ValueError)])
def test_num_classes_is_a_whole_number(given, error):
    with pytest.raises(error, match=f"num_classes .*got {given!r}"):
        class_count(np.arange(3, dtype=np.int32), given)
    assert data.from_arrays(arrays(), arrays(), num_classes=np.int64(5)).num_classes == 5


def test_the_label_is_no_input():
    for key in ("label", ["image", "label"]):
        with pytest.raises(ValueError, match="'label' is what is to be predicted"):
            data.from_arrays(arrays(), arrays(), input_key=key)
    with pytest.raises(ValueError, match="expected an input beside 'label'"):
        data.from_arrays(*[{"label": np.arange(4)}] * 2)


def test_numbers_that_would_be_infinite_once_standardized_are_told():
    good = {"x": np.array([[3e38], [-3e38]], np.float32), "label": np.arange(2)}
    far = {"x": np.array([[0.0], [1e-30]], np.float32), "label": np.arange(2)}
    with pytest.raises(ValueError, match=r"test\['x'\]: numbers from -3e\+38 to 3e\+38 are infinite in float32 once"):
        data.from_arrays(far, good)
    off = {"x": np.array([[3e38], [3e38], [3e38], [-3e38]], np.float32), "label": np.arange(4)}
    with pytest.raises(ValueError, match=r"train\['x'\]: numbers from -3e\+38 to 3e\+38"):
        data.from_arrays(off, off)
    assert np.isfinite(data.from_arrays(good, good).standardize(good["x"])).all()


def test_denormal_numbers_are_taken_for_zero_as_devices_do():
    tiny = {"x": np.array([[0.0], [1e-40]], np.float32), "label": np.arange(2)}
    assert np.isfinite(jnp.asarray(data.from_arrays(tiny, tiny).standardize(jnp.asarray(tiny["x"])))).all()


def test_one_training_example_is_told():
    with pytest.raises(ValueError, match="train: expected at least 2 examples, got 1"):
        data.from_arrays(arrays(1), arrays(3))
    assert len(data.from_arrays(arrays(2), arrays(1)).test["label"]) == 1


# ---- more than classifiers with one input


def tokens(n=6):
    return {"tokens": np.arange(n * 5).reshape(n, 5), "label": np.arange(n * 5).reshape(n, 5) + 1}


def test_tables_are_standardized_column_by_column():
    columns = np.array([[1.0, 1000.0], [3.0, 3000.0]])
    table = {"x": columns, "label": np.arange(2)}
    np.testing.assert_array_equal(data.from_arrays(table, table).standardize(columns), [[-1, -1], [1, 1]])
    alike = data.from_arrays(table, table, per_coordinate=False).statistics["x"]
    np.testing.assert_allclose(alike, [columns.mean(), columns.std()], rtol=1e-6)


@pytest.mark.parametrize("inputs", [np.arange(12, dtype=np.uint8).reshape(6, 2), np.ones([6, 4, 4]), np.ones(6)])
def test_everything_but_tables_is_standardized_as_a_whole(inputs):
    made = data.from_arrays(*[arrays(image=inputs)] * 2)
    assert made.statistics["image"].mean.shape == ()


def test_whole_numbers_stay_what_they_are():
    made = data.from_arrays(tokens(), tokens(3))
    assert (made.num_classes, made.statistics, made.train["tokens"].dtype) == (None, {}, np.int32)
    np.testing.assert_array_equal(made.standardize(made.train["tokens"]), tokens()["tokens"])
    assert made.inputs.of(made.train).dtype == np.int32
    assert data.from_arrays(tokens(), tokens(), num_classes=31).num_classes == 31
    with pytest.raises(ValueError, match="labels from 0 to 29, got 1 to 30"):
        data.from_arrays(tokens(), tokens(), num_classes=30)


def test_several_inputs_each_by_its_kind():
    split = tokens() | {
        "image": np.arange(24, dtype=np.uint8).reshape(6, 2, 2),
        "table": np.arange(12.0).reshape(6, 2),
        "mask": np.ones([6, 5], bool),
    }
    made = data.from_arrays(split, split)
    assert sorted(made.statistics) == ["image", "table"]
    assert [made.statistics[key].mean.shape for key in ("image", "table")] == [(), (2,)]
    seen = made.inputs.of(made.train)
    assert sorted(seen) == ["image", "mask", "table", "tokens"]
    assert (seen["tokens"].dtype, seen["mask"].dtype) == (np.int32, bool)
    np.testing.assert_allclose(seen["table"].std(0), 1, rtol=1e-6)
    whole = made.standardize(made.train)
    np.testing.assert_array_equal(whole["label"], split["label"])  # goes along as it is
    with pytest.raises(ValueError, match="several inputs, tokens, image, table, mask"):
        _ = made.input_key
    with pytest.raises(ValueError, match="expected the inputs image, mask, table, tokens, got the keys"):
        made.standardize({"tokens": split["tokens"]})


def test_the_inputs_are_those_that_are_named():
    made = data.from_arrays(*[arrays(weight=np.ones(6))] * 2, input_key="image")
    assert (made.input_key, sorted(made.train)) == ("image", ["image", "label", "weight"])
    two = data.from_arrays(*[arrays(weight=np.ones(6))] * 2, input_key=["image", "weight"], standardize=["weight"])
    assert (tuple(two.inputs.shapes), list(two.statistics)) == (("image", "weight"), ["weight"])
    with pytest.raises(ValueError, match=r"standardize=\['weight'\]: expected names of the inputs image"):
        data.from_arrays(*[arrays(weight=np.ones(6))] * 2, input_key="image", standardize=["weight"])


@pytest.mark.parametrize("label", [np.arange(6) / 4, np.arange(12.0).reshape(6, 2)])
def test_the_labels_of_a_regression_are_floats(label):
    made = data.from_arrays(arrays(label=label), arrays(label=label))
    assert (made.num_classes, made.train["label"].dtype) == (None, np.float32)
    np.testing.assert_array_equal(made.train["label"], label)
    with pytest.raises(TypeError, match="num_classes=3 expects integer labels, got labels of float32"):
        data.from_arrays(arrays(label=label), arrays(label=label), num_classes=3)


def test_a_data_set_without_labels():
    points = {"x": np.arange(8.0).reshape(4, 2)}
    made = data.from_arrays(points, points)
    assert (made.num_classes, made.input_key, len(made)) == (None, "x", 4)
    with pytest.raises(TypeError, match="num_classes=2 expects integer labels, got no 'label'"):
        data.from_arrays(points, points, num_classes=2)


# ---- what was done to the inputs, kept with a run


def test_inputs_are_read_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    split = tokens(50) | {
        "table": rng.lognormal(0, 8, [50, 3]),
        "image": rng.integers(0, 255, [50, 2, 2], np.uint8),
        "half": jnp.asarray(rng.normal(size=[50, 2]), jnp.bfloat16),
    }
    made = data.from_arrays(split, split)
    (tmp_path / data.INPUTS_FILE).write_text(made.inputs.to_json())
    found = data.read_inputs(tmp_path)
    assert (found.shapes, found.dtypes) == (made.inputs.shapes, made.inputs.dtypes)
    assert found.statistics.keys() == made.statistics.keys()
    for key, ours in made.statistics.items():
        for one, other in zip(ours, found.statistics[key], strict=True):
            assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def test_a_batch_of_another_shape_is_told():
    table = {"x": np.arange(6.0).reshape(2, 3), "label": np.arange(2)}
    made = data.from_arrays(table, table)
    assert made.standardize(jnp.ones([7, 3])).shape == (7, 3)
    for wrong in (np.ones([7, 1]), np.ones(()), np.ones([3, 7])):
        with pytest.raises(ValueError, match=r"expected 'x' to be of shape \(3,\)"):
            made.standardize(wrong)


def test_damaged_inputs_are_told_by_name(tmp_path):
    table = {"x": np.arange(6.0).reshape(2, 3), "label": np.arange(2)}
    whole = data.from_arrays(table, table).inputs.to_json()
    with pytest.raises(FileNotFoundError, match=r"has no inputs.json: it is no run's folder, or from before"):
        data.read_inputs(tmp_path)
    path, large = tmp_path / data.INPUTS_FILE, whole.replace("1.5", "1" + "0" * 400)
    nan, missing = whole.replace("1.5", "NaN"), whole.replace("std", "sd")
    for damaged in ("", "[1]", whole[:-9], nan, missing, "[" * 100_000, large):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=rf"^{path} cannot be read"):
            data.read_inputs(tmp_path)
    path.write_text(whole.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="its format is 2, expected 1"):
        data.read_inputs(tmp_path)


# ---- sources


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
        (Source([{"x": 0}, {"x": 0, "y": 1}]), ValueError, r"the same keys, \['x'\], got \['x', 'y'\] in item 1"),
        (Source([{"x": 0}] * 4096 + [{"x": 0, "y": 1}]), ValueError, r"got \['x', 'y'\] in item 4096"),
        (Source([{"x": np.zeros(2)}] * 4096 + [{"x": np.zeros(3)}]), ValueError, "the same shapes"),
    ],
)
def test_wrong_sources_are_told(train, error, message):
    with pytest.raises(error, match=message):
        read(train)
