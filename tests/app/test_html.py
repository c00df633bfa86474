"""The run's page: what it says, that it is alone on its reader's machine, and how it looks in a browser."""

import base64
import html.parser
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from problems import blobs, small_config

from isgd_jax.app import compare, data, plots
from isgd_jax.app.checkpoints import Checkpoints
from isgd_jax.app.html import comparison_page, hardest, run_page
from isgd_jax.app.records import Record
from isgd_jax.app.run_dir import RunDir

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(html.parser.HTMLParser):
    """What the tests ask of a page: its tags, its text, and whether every tag is closed."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text += " ".join(text.split()) + " "

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


def line(step: int, **more: Any) -> Record:
    values = {
        "seconds": step / 10, "train_seconds": step / 20, "loss": None if step == 0 else 1 / step, "test_loss": 1.25,
        "test_error": 0.5, "sd_uniform": 3.0, "sd_stale": 2.0, "sd_ideal": 1.0, "variance_ratio": 0.44,
        "age_mean": 5.0, "age_p95": 9.0, "max_weight": 4.0, "steps_per_second": 12.0, "share_scoring": 0.125,
        "share_updating": 0.5, "share_measuring": 0.375,
    }  # fmt: skip
    return {"event": "progress", "step": step, **values, **more}


def make_run(
    path: Path, *, scores: np.ndarray | None = None, dataset: data.Dataset | None = None, **more: Any
) -> RunDir:
    """A run as `fit` leaves it: lines, an environment, a checkpoint with a table."""
    run = RunDir.create(small_config(path, learning_rate=0.125))
    for step in (0, 10, 20):
        run.append(line(step, **more))
    run.append({"event": "warning", "step": 20, "seconds": 2.0, "text": "3 scores were not finite"})
    run.append({"event": "finished", "step": 20, "seconds": 2.5, "spent": {"scoring": 0.5, "updating": 1.5}})
    run.write_environment(["TPU_0"], "abc123")
    if scores is not None:
        versions = np.where(scores > 0, 17, -1).astype(np.int32)
        checkpoints = Checkpoints(run.checkpoints, identity={"data set": dataset.fingerprint if dataset else "other"})
        sampler = {
            "table": {"scores": scores, "versions": versions},
            "proposal": {"law": {"masses": np.float32(3.0) * (scores + 1)}},
        }
        checkpoints.save(20, {"state": {"sampler": sampler}}, {})
        checkpoints.close()
    return run


def digits_like() -> data.Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 17, size=(12, 8, 8, 1)).astype(np.uint8)
    split = {"image": images, "label": np.arange(12) % 3}
    return data.from_arrays(split, split, name="pictures")


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> data.Dataset:
    dataset = digits_like()
    monkeypatch.setattr(hardest.data, "load", lambda *args, **kwargs: dataset)
    return dataset


SCORES = np.array([0.5, 0.0, 8.0, 1.0, 1.0, 1.0, 4.0, 1.0, 1.0, 1.0, 0.0, 1.0], np.float32)


NAME = "mine <script>alert(1)<"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run that has everything, under a name that looks like markup."""
    dataset = digits_like()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardest.data, "load", lambda *args, **kwargs: dataset)
        return run_page([make_run(tmp_path_factory.mktemp("runs") / NAME, scores=SCORES, dataset=dataset)])


@pytest.mark.slow
def test_the_page_holds_everything_and_nothing_from_elsewhere(source: str) -> None:
    page = Page(source)
    for said in ("mine", "finished at update 20", "held-out error", "50.0 %", "3 scores were not finite", "TPU_0"):
        assert said in page.text, said
    for name in ("loss", "error", "variance", "ratio", "scores", "time", "norms", "weights"):
        assert f"run0-{name}" in page.attributes("id")
    assert sum(tag == "svg" for tag, _ in page.tags) == 8
    links = page.attributes("href") + page.attributes("src") + page.attributes("xlink:href")
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "script" not in [tag for tag, _ in page.tags]
    assert "@import" not in source


@pytest.mark.slow
def test_the_hardest_examples_are_those_with_the_largest_scores(tmp_path: Path, pictures: data.Dataset) -> None:
    run = make_run(tmp_path / "run", scores=SCORES, dataset=pictures)
    found = hardest.scores(run, count=3)
    assert found is not None
    assert [hard.example for hard in found.hardest] == [2, 6, 3]
    assert [hard.label for hard in found.hardest] == [2, 0, 0]
    assert [hard.age for hard in found.hardest] == [3, 3, 3]
    assert (found.step, len(found.known), found.num_examples, found.remarks) == (20, 10, 12, [])
    assert found.probs == pytest.approx((SCORES + 1) / (SCORES + 1).sum())
    assert found.hardest[0].times_mean == pytest.approx(8.0 / SCORES[SCORES > 0].mean())
    picture = found.hardest[0].picture
    assert picture is not None
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))))
    expected = pictures.train["image"][2, ..., 0]
    assert np.abs(shown.astype(float) - expected * 255.0 / pictures.train["image"].max()).max() <= 1
    text = Page(run_page([run])).text
    assert "#2 , label 2" in text
    assert "of the 10 examples that were scored" in text


def test_what_is_no_picture_shows_its_first_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = blobs(12)
    monkeypatch.setattr(hardest.data, "load", lambda *args, **kwargs: dataset)
    found = hardest.scores(make_run(tmp_path / "run", scores=SCORES, dataset=dataset))
    assert found is not None
    assert found.hardest[0].picture is None
    assert f"{dataset.train['features'][2, 0]:.3g}, " in str(found.hardest[0].values)


@pytest.mark.slow
def test_other_data_are_not_shown_as_the_runs(tmp_path: Path, pictures: data.Dataset) -> None:
    run = make_run(tmp_path / "run", scores=SCORES)
    found = hardest.scores(run)
    assert found is not None
    assert "trained on other examples" in str(found.remarks)
    assert all(hard.picture is None and hard.label == -1 for hard in found.hardest)
    assert "trained on other examples" in Page(run_page([run])).text


@pytest.mark.parametrize(
    ("image", "expected"),
    [(np.zeros((8, 8, 1)), True), (np.zeros((8, 8)), True), (np.zeros((8, 8, 5)), False), (np.zeros(64), False)],
)
def test_what_a_picture_is(image: np.ndarray, expected: bool) -> None:
    assert hardest.is_image(image) is expected


@pytest.mark.slow
def test_without_whole_checkpoints_the_rest_is_shown_and_the_loss_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.checkpoints / "7").mkdir(parents=True)
    text = Page(run_page([run])).text
    assert "The hardest examples are missing: every checkpoint in" in text
    assert "held-out loss" in text


def test_a_page_prepares_no_data_set_and_imports_nothing_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.catalog, "_require_tfds", lambda: None)
    with pytest.raises(FileNotFoundError, match=r"digits is not prepared in .*elsewhere"):
        data.load("digits", data_dir=tmp_path / "elsewhere", prepare=False)
    assert not (tmp_path / "elsewhere").exists()
    folder = tmp_path / "mine" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    for key in ("pythonClassName", "python_class_name", "type"):
        (folder / "features.json").write_text(json.dumps({"featuresDict": [{key: "evil_module.X"}]}))
        with pytest.raises(ValueError, match=r"features.json in .* names evil_module.X, which is no class of TFDS"):
            data.load("mine", data_dir=tmp_path, prepare=False)
    assert "evil_module" not in sys.modules


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    page = Page(run_page([RunDir.create(small_config(tmp_path / "run"))]))
    assert "nothing recorded yet" in page.text
    assert "This run has no scores at a checkpoint" in page.text


@pytest.mark.slow
def test_fields_that_came_later_are_shown(tmp_path: Path) -> None:
    """Bands, new numbers, texts and lists: a line of progress may hold more than this code knows."""
    more: dict[str, Any] = {"sd_stale_low": 1.5, "sd_stale_high": 2.5, "note": "x", "many": [1, 2], "constant": 1.0}
    run = make_run(tmp_path / "run", bytes_sent=7.0, **more)
    run.append(line(30, bytes_sent=9.0, **more))
    lines = list(run.records("progress"))
    assert plots.others(lines) == ["bytes_sent"]
    page = Page(run_page([run]))
    assert "run0-others" in page.attributes("id")
    assert "bytes sent" in page.text
    axes = plots.all_figures(lines)["variance"].axes[0]
    assert len(axes.collections) == 1


@pytest.mark.slow
def test_bands_stand_with_their_number_and_fields_have_names_in_words(tmp_path: Path) -> None:
    more: dict[str, Any] = {"sd_stale_low": 1.5, "sd_stale_high": 2.5, "gate_is_open": False, "by": {"a": 1, "b": 2}}
    run = make_run(tmp_path / "run", **more)
    text = Page(run_page([run])).text
    assert all(words in text for words in ("√Tr Cov, in use", "2 [1.5, 2.5]", "gate is open", " no ", "a 1, b 2"))
    assert "sd stale" not in text


def test_fields_that_are_missing_are_left_out(tmp_path: Path) -> None:
    run = RunDir.create(small_config(tmp_path / "run"))
    run.append({"event": "progress", "step": 0, "test_loss": 2.0})
    page = Page(run_page([run]))
    drawn = [attrs["id"] for tag, attrs in page.tags if tag == "figure"]
    assert drawn == ["run0-loss", "run0-variance"]  # no error where none was measured


@pytest.mark.slow
def test_a_name_is_text_and_never_markup(source: str) -> None:
    page = Page(source)
    assert "script" not in [tag for tag, _ in page.tags]
    assert NAME in page.text


@pytest.mark.slow
def test_what_is_not_the_default_is_marked(source: str) -> None:
    marked = [row for row in source.split("<tr") if row.startswith(' class="changed"')]
    assert any("learning rate" in row and "0.125" in row for row in marked)
    assert not any("momentum" in row for row in marked)


@pytest.mark.slow
def test_several_runs_share_a_page_and_no_id(tmp_path: Path) -> None:
    page = Page(run_page([make_run(tmp_path / "one"), make_run(tmp_path / "two")]))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {"#run0", "#run1"} <= set(page.attributes("href"))
    used = {part.partition(")")[0] for tag in page.attributes("clip-path") for part in tag.split("url(#")[1:]}
    assert used
    assert used <= set(ids)


@pytest.mark.slow
def test_the_page_of_a_comparison(tmp_path: Path) -> None:
    curves = {name: {seed: [line(0), line(10, test_loss=0.5)] for seed in range(2)} for name in ("a", "b<c")}
    study = compare.Study(curves)
    page = Page(comparison_page(study, compare.rows(study, compare.levels("test_loss=0.5")), "A study"))
    for said in ("A study", "b<c (2 seeds)", "10 updates [10, 10]", "1.00 [1.00, 1.00]", "2/2"):
        assert said in page.text, said
    assert "test_loss-updates" in page.attributes("id")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: nobody looks at the page here")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_in_a_browser(theme: str, tmp_path: Path, source: str) -> None:
    """A screenshot: the background follows the theme, there is something on it, and our blue is that of the theme."""
    page, shot = tmp_path / "page.html", tmp_path / "shot.png"
    page.write_text(source)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,1400", f"--screenshot={shot}",
               f"--blink-settings=preferredColorScheme={int(theme == 'light')}"]  # fmt: skip
    subprocess.run([str(CHROMIUM), *options, page.as_uri()], check=True, capture_output=True, timeout=150)
    seen = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    expected = {"light": ((255, 255, 255), (0x00, 0x72, 0xB2)), "dark": ((0x15, 0x18, 0x1B), (0x4D, 0xB2, 0xEC))}
    background, blue = expected[theme]
    assert tuple(seen[2, 2]) == background
    assert (np.abs(seen - np.array(blue)).max(-1) < 12).sum() > 200
    assert 0.02 < (np.abs(seen - np.array(background)).max(-1) > 40).mean() < 0.6
