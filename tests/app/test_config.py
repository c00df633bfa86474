import dataclasses

import pytest

from isgd_jax.app.config import GONE, MAY_CHANGE_ON_RESUME, Config, refuse_gone
from isgd_jax.app.presets import PRESETS


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("batch_size", 0, "--batch-size must be at least 1; got 0"),
        ("learning_rate", -1.0, "--learning-rate must be above 0"),
        ("learning_rate", float("inf"), "--learning-rate must be above 0"),
        ("mixture", 0.0, "--mixture must be above 0 and at most 1"),
        ("mixture", 1.5, "--mixture must be above 0 and at most 1"),
        ("refresh_share", 0.0, "--refresh-share must be above 0"),
        ("hidden", (512, 0), "--hidden must be widths of at least 1"),
        ("seed", -1, "--seed must be between"),
        ("epochs", 0.0, "--epochs must be above 0"),
        ("max_age", -1, "--max-age must be 0 or more"),
        ("publish_every", 7, "--publish-every must be --refresh-every unless workers score in relaxed mode"),
        ("refetch_every", 2, "--refetch-every must be 1 unless workers score in relaxed mode"),
        ("chunk_patience", 0.0, "--chunk-patience must be above 0"),
        ("train_devices", 2, "--train-devices must be 1 unless --engine local"),
        ("candidates", 0, "--candidates must be at least 1"),
        ("score_memory", 1.0, "--score-memory must be at least 0 and below 1"),
        ("mode", "static", "--static-scores must be a file in static mode, and in no other"),
        ("static_scores", "scores.npy", "--static-scores must be a file in static mode, and in no other"),
        ("weight_decay", 0.1, "--weight-decay must be 0 unless --optimizer adamw"),
        (
            "sampler",
            "shuffled",
            "--sampler must be one of auto, stratified, independent, systematic",
        ),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Config(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", "32"),
        ("batch_size", 32.0),
        ("batch_size", True),
        ("learning_rate", float("nan")),
        ("mode", "sometimes"),
        ("hidden", [512]),
        ("run_dir", 3),
        ("full_train_loss", 1),
    ],
)
def test_a_wrong_type_is_named(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"--{field.replace('_', '-')} must be .*; got"):
        Config(**{field: value})


def test_without_a_mixture_the_additive_constant_must_keep_all_drawable() -> None:
    assert Config(mixture=0.0, additive=10.0).mixture == 0.0


def test_the_presets_have_the_values_of_the_paper() -> None:
    first, second = PRESETS["paper-1"], PRESETS["paper-2"]
    assert (first.learning_rate, first.additive, second.learning_rate, second.additive) == (0.01, 10.0, 0.001, 1.0)
    for preset in (first, second):
        assert (preset.batch_size, preset.chunk_size, preset.momentum, preset.refresh_every) == (128, 2048, 0.95, 32)
        assert (preset.max_age_seconds, preset.min_trusted) == (20.0, 0.1)
        assert Config.from_dict(preset.to_dict()) == preset


def test_json_brings_the_same_configuration_back() -> None:
    config = Config(mode="relaxed", hidden=(8, 4), epochs=2.5, max_age=7)
    assert Config.from_dict(config.to_dict()) == config


def test_an_unknown_key_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="unknown configuration key 'learning_rat'; did you mean 'learning_rate'"):
        Config.from_dict({"learning_rat": 0.1})


OLD: dict[str, tuple[object, object]] = {
    "coin": (1.0, 0.8),
    "held_out_by": ("trainer", "workers"),
    "power": (1.0, 0.5),
    "probe_every": (None, 100),
    "refresh_when": ("always", "worth"),
    "rescore": ("turn", "benefit"),
}
"""Options that went, with the values they had in runs that had not chosen them, and in runs that had."""
OLD_SIZES: dict[str, object] = {"priorities": [5, 1, 1], "probe_size": 4}
"""Sizes that went along with one of them: without it they decided nothing, whatever they were."""


def test_the_configuration_of_an_old_run_that_used_nothing_that_went_is_read() -> None:
    unchosen = {name: value for name, (value, _) in OLD.items()} | OLD_SIZES
    assert Config.from_dict(Config(seed=3).to_dict() | unchosen) == Config(seed=3)


@pytest.mark.parametrize("name", OLD)
def test_an_old_run_that_used_what_went_is_refused_by_what_to_do_instead(name: str) -> None:
    _, chosen = OLD[name]
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} went in 0.2: ") as refused:
        Config.from_dict({name: chosen})
    assert str(refused.value) == GONE[name]


def test_a_value_that_went_is_refused_by_what_to_do_instead() -> None:
    with pytest.raises(ValueError, match=r"^--sampler poisson went in 0.2: use stratified"):
        Config.from_dict({"sampler": "poisson"})
    assert Config.from_dict({"sampler": "stratified"}).sampler_in_use == "stratified"


def test_all_that_went_is_tried() -> None:
    assert {*OLD, *OLD_SIZES, "sampler poisson"} == set(GONE)
    assert not set(GONE) & {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("name", GONE)
def test_a_flag_that_went_is_found_however_it_is_written(name: str) -> None:
    flag, _, value = name.partition(" ")
    dashed = f"--{flag.replace('_', '-')}"
    for arguments in ([dashed, value or "1"], [f"{dashed}={value or 1}"], [f"--{flag}", value or "1"]):
        with pytest.raises(ValueError, match=r"^--.* went in 0\.2: "):
            refuse_gone(["train", "--seed", "1", *arguments])
    refuse_gone(["train", "--sampler", "stratified", "--run-dir", flag, "--out=poisson", flag])


def test_epochs_count_batches_of_the_data_set() -> None:
    assert Config(epochs=2.0, batch_size=10).num_steps(105) == 21
    assert Config(steps=7).num_steps(105) == 7


def test_auto_sampler_is_the_best_of_its_mode() -> None:
    assert Config(mode="uniform").sampler_in_use == "shuffled"
    assert Config(mode="exact").sampler_in_use == "stratified"
    assert Config(mode="relaxed", sampler="independent").sampler_in_use == "independent"


def test_fields_free_on_resume_exist() -> None:
    assert {field.name for field in dataclasses.fields(Config)} >= MAY_CHANGE_ON_RESUME


def test_cells_need_scores_that_an_engine_brings() -> None:
    with pytest.raises(ValueError, match="--order must be another than cells but in exact and relaxed mode"):
        Config(mode="uniform", order="cells")
    assert Config(mode="relaxed").order_in_use == "cells"
    assert Config(mode="exact", engine="local").order_in_use == "cells"
    assert Config(mode="relaxed", engine="local").order_in_use == "label-score"
    assert Config(mode="presample").order_in_use == "label-score"
