import dataclasses
import json
from pathlib import Path
from typing import get_type_hints

import pytest
import tyro

from isgd_jax.app.config import MAY_CHANGE_ON_RESUME, VERSION, Config, configure
from isgd_jax.app.flags import in_flags
from isgd_jax.app.gone import GONE, IN_PYTHON, refuse_gone
from isgd_jax.app.presets import PRESETS
from isgd_jax.app.run_dir import RunDir


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("batch_size", 0, "batch_size must be at least 1; got 0"),
        *(
            (name, 2**31, f"{name} must be at most 2,147,483,647; got 2147483648")
            for name in ("batch_size", "steps", "refresh_every", "log_every", "checkpoint_every", "chunk_size")
        ),
        ("learning_rate", -1.0, "learning_rate must be above 0"),
        ("learning_rate", float("inf"), "learning_rate must be above 0"),
        ("mixture", 0.0, "mixture must be above 0 and at most 1"),
        ("mixture", 1.5, "mixture must be above 0 and at most 1"),
        ("refresh_share", 0.0, "refresh_share must be above 0"),
        ("hidden", (512, 0), "hidden must be at least 1 each"),
        ("seed", -1, "seed must be between"),
        ("epochs", 0.0, "epochs must be above 0"),
        ("max_age", -1, "max_age must be 0 or more"),
        ("publish_every", 7, "publish_every must be refresh_every=100 unless workers score with mode=relaxed"),
        ("refetch_every", 2, "refetch_every must be 1 unless workers score with mode=relaxed"),
        ("chunk_patience", 0.0, "chunk_patience must be above 0"),
        ("train_devices", 2, "train_devices must be 1 unless engine=local"),
        ("candidates", 0, "candidates must be at least 1"),
        ("score_memory", 1.0, "score_memory must be at least 0 and below 1"),
        ("mode", "static", "static_scores must be a file with mode=static, and left out otherwise"),
        ("static_scores", "scores.npy", "static_scores must be a file with mode=static, and left out otherwise"),
        ("weight_decay", 0.1, "weight_decay must be 0 unless optimizer=adamw"),
        ("data_dir", "a\ud800", "data_dir must be a text without half a character"),
        (
            "sampler",
            "shuffled",
            "sampler must be one of auto, stratified, independent, systematic",
        ),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        configure(**{field: value})


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
    with pytest.raises(TypeError, match=f"{field} must be .*; got"):
        configure(**{field: value})


def test_without_a_mixture_the_additive_constant_must_keep_all_drawable() -> None:
    assert configure(mixture=0.0, additive=10.0).sampling.mixture == 0.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"engine": "local", "distributed": True}, "engine must be inline with distributed=True; got 'local'"),
        ({"mode": "relaxed", "publish_every": 7}, "publish_every must be refresh_every=100 unless workers score"),
        ({"mode": "relaxed", "engine": "local", "score_budget": 0.5}, "score_budget must be left out except with mode"),
        ({"score_budget": 0.5}, "score_budget must be left out except with mode=relaxed and engine=inline; got 0.5"),
        ({"mode": "uniform", "replay": "run"}, "replay must be left out with mode=uniform, which has no schedule"),
        ({"engine": "local", "train_devices": 3}, "batch_size must be a multiple of train_devices=3; got 32"),
        ({"hold": "host", "mode": "presample"}, "hold must be device with mode=presample, which needs the data there"),
        ({"hold": "disk", "full_train_loss": True}, "hold must be device with full_train_loss=True"),
        ({"hold": "disk", "distributed": True}, "hold must be device with distributed=True"),
        ({"hold": "host", "engine": "local", "train_devices": 2}, "hold must be device with train_devices=2"),
        ({"address": "auto"}, "address must be left out unless engine=cluster; got 'auto'"),
        ({"distributed": True, "num_processes": 2, "process_id": 2}, "process_id must be below num_processes=2; got 2"),
    ],
)
def test_fields_that_contradict_each_other_are_named(fields: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        configure(**fields)


def test_a_field_is_in_one_part_and_no_part_is_large() -> None:
    parts = {part.name: dataclasses.fields(getattr(Config(), part.name)) for part in dataclasses.fields(Config)}
    assert sum(map(len, parts.values())) == len(Config().flat())
    assert max(len(fields) for fields in [parts, *parts.values()]) <= 12


def test_fields_change_by_name_in_whatever_part_they_are() -> None:
    changed = configure(mode="relaxed").replace(batch_size=7, refresh_every=3)
    assert (changed.sampling.mode, changed.training.batch_size, changed.refresh.refresh_every) == ("relaxed", 7, 3)
    assert changed.flat() == Config().flat() | {"mode": "relaxed", "batch_size": 7, "refresh_every": 3}
    assert changed.replace() is not changed
    assert changed.replace() == changed
    with pytest.raises(
        ValueError, match="there is no field 'learning_rat' in a configuration; did you mean 'learning_"
    ):
        changed.replace(learning_rat=0.1)


def test_the_presets_have_the_values_of_the_paper() -> None:
    first, second = PRESETS["paper-1"], PRESETS["paper-2"]
    alike = {
        "batch_size": 128, "chunk_size": 2048, "momentum": 0.95, "refresh_every": 32, "max_age_seconds": 20.0,
        "min_trusted": 0.1,
    }  # fmt: skip
    assert alike | {"learning_rate": 0.01, "additive": 10.0} == {
        name: first.flat()[name] for name in (*alike, "learning_rate", "additive")
    }
    assert second == first.replace(learning_rate=0.001, additive=1.0)


def test_json_brings_the_same_configuration_back() -> None:
    for config in (configure(mode="relaxed", hidden=(8, 4), epochs=2.5, max_age=7), *PRESETS.values()):
        written = json.loads(json.dumps(config.to_dict()))
        assert written["version"] == VERSION
        assert written["sampling"]["mode"] == "relaxed"
        assert Config.from_dict(written) == config


def test_a_flat_configuration_of_an_earlier_version_is_read() -> None:
    flat = {"dataset": "fashion_mnist", "hidden": [8, 4], "mode": "relaxed", "epochs": None, "batch_size": 16}
    config = configure(dataset="fashion_mnist", hidden=(8, 4), mode="relaxed", batch_size=16)
    assert Config.from_dict(flat) == config
    assert Config.from_dict(json.loads(json.dumps(config.flat()))) == config


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"learning_rat": 0.1}, "there is no field 'learning_rat' in a configuration; did you mean 'learning_rate'?"),
        ({"batch_size": "many"}, "batch_size must be int; got 'many' of type str"),
        ({"version": 3}, "the configuration has version 3, this isgd_jax reads version 2 and older: use the isgd_jax"),
        ({"version": 2, "dta": {}}, "there is no part 'dta' in a configuration; did you mean 'data'?"),
        ({"version": 2, "data": 3}, "the part 'data' of a configuration must be an object of its fields; got 3"),
        ({"version": 2, "data": {"hol": "host"}}, "there is no field 'hol' in the part 'data'; did you mean 'hold'?"),
        ({"version": 2, "data": {"batch_size": 3}}, "there is no field 'batch_size' in the part 'data': use the isgd"),
        ({"version": 2, "training": {"steps": 2.5}}, "steps must be int; got 2.5 of type float"),
        ({"version": 2, "model": {"hidden": [8, None]}}, "hidden must be a tuple of int; got (8, None)"),
        ({"version": 2, "sampling": {"mode": ["exact"]}}, "mode must be 'uniform' or 'exact' or 'relaxed' or"),
        ({"version": 2, "recording": {"log_every": 0}}, "log_every must be at least 1; got 0"),
    ],
)
def test_a_damaged_configuration_is_named_with_its_file(
    values: dict[str, object], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises((ValueError, TypeError)) as caught:
        RunDir(tmp_path).read_config()
    assert str(caught.value).startswith(f"{tmp_path}/config.json: {expected}")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("batch_size must be at least 1; got 0", "--batch-size must be at least 1; got 0"),
        ("mode must be left out unless distributed=True", "--mode must be left out unless --distributed"),
        ("seed=1, but the run was started with 0", "--seed 1, but the run was started with 0"),
        ("no Ray at address='a:1': leave out address= here", "no Ray at --address a:1: leave out --address here"),
        ("uniform_fraction must be a number", "--mixture must be a number"),
        ("run `ray start --address=HOST:6379`", "run `ray start --address=HOST:6379`"),
        ("runs/seed=3/batch_size is not the folder of a run", "runs/seed=3/batch_size is not the folder of a run"),
        ("another run of the arm 'mode=exact' with seed 3", "another run of the arm 'mode=exact' with seed 3"),
        ("the engine scores in steps; num_examples must fit", "the engine scores in steps; num_examples must fit"),
    ],
)
def test_messages_of_the_library_become_flags_and_the_rest_stays(message: str, expected: str) -> None:
    assert in_flags(message) == expected


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
    assert Config.from_dict(configure(seed=3).flat() | unchosen) == configure(seed=3)


@pytest.mark.parametrize("name", OLD)
def test_an_old_run_that_used_what_went_is_refused_by_what_to_do_instead(name: str) -> None:
    _, chosen = OLD[name]
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} went in 0.2: ") as refused:
        Config.from_dict({name: chosen})
    assert str(refused.value) == GONE[name]


def test_a_value_that_went_is_refused_by_what_to_do_instead() -> None:
    with pytest.raises(ValueError, match=r"^--sampler poisson went in 0.2: use stratified"):
        Config.from_dict({"sampler": "poisson"})
    assert Config.from_dict({"sampler": "stratified"}).sampling.sampler_in_use == "stratified"


def test_all_that_went_is_tried() -> None:
    assert {*OLD, *OLD_SIZES, "sampler poisson"} == set(GONE)
    assert not set(GONE) & set(Config().flat())


@pytest.mark.parametrize("name", GONE)
def test_a_flag_that_went_is_found_however_it_is_written(name: str) -> None:
    flag, _, value = name.partition(" ")
    dashed = f"--{flag.replace('_', '-')}"
    for arguments in ([dashed, value or "1"], [f"{dashed}={value or 1}"], [f"--{flag}", value or "1"]):
        with pytest.raises(ValueError, match=r"^--.* went in 0\.2: "):
            refuse_gone(["train", "--seed", "1", *arguments])
    refuse_gone(["train", "--sampler", "stratified", "--run-dir", flag, "--out=poisson", flag])


def test_fields_without_a_flag_are_those_that_are_refused_as_flags() -> None:
    marked = {
        name
        for part in Config().__dict__.values()
        for name, hint in get_type_hints(type(part), include_extras=True).items()
        if tyro.conf.Fixed in getattr(hint, "__metadata__", ())
    }
    assert marked == set(IN_PYTHON)
    for name in IN_PYTHON:
        with pytest.raises(ValueError, match=rf"went in 0\.2: .*configure\({name}="):
            refuse_gone(["train", f"--{name.replace('_', '-')}=1"])


def test_epochs_count_batches_of_the_data_set() -> None:
    assert configure(epochs=2.0, batch_size=10).training.num_steps(105) == 21
    assert configure(steps=7).training.num_steps(105) == 7


def test_auto_sampler_is_the_best_of_its_mode() -> None:
    assert configure(mode="uniform").sampling.sampler_in_use == "shuffled"
    assert configure(mode="exact").sampling.sampler_in_use == "stratified"
    assert configure(mode="relaxed", sampler="independent").sampling.sampler_in_use == "independent"


def test_fields_free_on_resume_exist() -> None:
    assert set(Config().flat()) >= MAY_CHANGE_ON_RESUME


def test_cells_need_scores_that_an_engine_brings() -> None:
    with pytest.raises(ValueError, match="order must be another than cells except with mode=exact and mode=relaxed"):
        configure(mode="uniform", order="cells")
    assert configure(mode="exact", order="cells").order_in_use == "cells"
    assert configure(mode="exact").order_in_use == configure(mode="presample").order_in_use == "label-score"
