"""The model of a run, in Python and as a command: raw inputs give the outputs that training measured."""

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from problems import blobs, small_config

from isgd_jax.app import data, trained
from isgd_jax.app.commands import predict
from isgd_jax.app.run import fit


@pytest.mark.slow
@pytest.mark.usefixtures("failed_reads")
def test_the_model_of_a_run_predicts_from_raw_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = blobs(60)
    run_dir = str(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        trained.load(run_dir)
    result = fit(small_config(tmp_path / "run", mode="uniform", monitor="off"), dataset=dataset)
    model = trained.load(run_dir)
    inputs = dataset.test["features"]
    logits = model(inputs)
    assert (logits.shape[0], model.step) == (len(inputs), result.step)
    again = model({"features": inputs})
    np.testing.assert_array_equal(logits, again)
    expected = [
        model.model.apply({"params": result.params}, jnp.asarray(dataset.inputs.standardize(one))) for one in inputs
    ]
    np.testing.assert_allclose(logits, np.stack(expected), rtol=1e-5, atol=1e-6)
    np.save(tmp_path / "x.npy", inputs)
    assert predict.run(predict.Predict(run_dir, str(tmp_path / "x.npy"))) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "x-outputs.npy"), logits)
    assert f"outputs [{len(inputs)}, {logits.shape[1]}]" in capsys.readouterr().out
    assert predict.run(predict.Predict(run_dir, str(tmp_path / "x.npy"), out=str(tmp_path / "outputs"))) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "outputs"), logits)  # of the very name
    with pytest.raises(ValueError, match=r"expected 'features' of shape \[n, .* as the run was trained on; got"):
        model(inputs[:, :1])
    (tmp_path / "x.npy").write_text("no array")
    with pytest.raises(ValueError, match=r"x.npy cannot be read .*: expected a .npy or .npz file"):
        predict.run(predict.Predict(run_dir, str(tmp_path / "x.npy")))
    np.save(tmp_path / "x.npy", inputs)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "40" / "record")
    assert predict.run(predict.Predict(run_dir, str(tmp_path / "x.npy"))) == 0
    said = capsys.readouterr()
    assert "of the parameters at update 30" in said.out
    assert "isgd: the checkpoint of step 40 is damaged" in said.err
    (tmp_path / "run" / "environment.json").unlink()
    with pytest.raises(ValueError, match=r"environment\.json\): bring that file back, or give the model in Python"):
        trained.load(run_dir)


class Sum:
    """A model without parameters."""

    def init(self, *args: Any, **options: Any) -> Any:
        return {"params": {}}

    def apply(self, variables: Any, x: Any) -> Any:
        return sum(jnp.sum(one).astype(jnp.float32) for one in (x.values() if isinstance(x, dict) else [x]))


def reading(**kinds: Any) -> trained.Trained:
    """A model that gives the sum of its inputs [n, 2] of these types, none of them standardized."""
    inputs = data.Inputs(dict.fromkeys(kinds, (2,)), {name: np.dtype(kind).name for name, kind in kinds.items()}, {})

    return trained.Trained(Sum(), {}, inputs, 0)


def test_every_row_is_predicted_whatever_else_lies_beside_the_inputs() -> None:
    model, rows = reading(a=np.float32, b=np.int32), np.arange(6).reshape(3, 2)
    floats = rows.astype(np.float64)
    assert model({"label": np.zeros(1), "a": floats, "b": rows}).tolist() == [2.0, 10.0, 18.0]
    for wrong, message in (
        ({"a": floats, "b": rows[:2]}, r"inputs of one length, a row for each example; got .*'a': 3, 'b': 2"),
        ({"a": floats, "b": rows, "c": rows, "d": rows}, r"expected the inputs a, b, .*; got c, d too"),
        ({"a": floats}, r"expected 'b' of shape \[n, 2\], as the run was trained on; got nothing"),
        ({"a": floats[:0], "b": rows[:0]}, "at least one example, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            model(wrong)


@pytest.mark.parametrize(
    ("trained_on", "x", "message"),
    [
        (np.int32, np.full((3, 2), 2**40), "'x': expected integers that int32 can hold, got 1099511627776"),
        (np.float32, np.full((3, 2), np.nan), "'x': expected finite numbers"),
        (np.float16, np.full((3, 2), 1e5), "'x': expected numbers that float16 can hold"),
        (
            np.uint8,
            np.full((3, 2), 0.5),
            r"'x': expected whole numbers, .* trained on uint8; got float.*the same scale",
        ),
        (np.uint8, np.full((3, 2), 256), "'x': expected numbers that uint8 can hold"),
        (np.float32, np.full((3, 2), 3), "'x': expected floating numbers, .* trained on float32; got int"),
        (np.float32, np.ma.masked_array(np.zeros((3, 2))), "'x': expected an array without a mask"),
    ],
)
def test_inputs_are_looked_at_as_a_training_set_is(trained_on: Any, x: Any, message: str) -> None:
    model = reading(x=trained_on)
    for given in (x, {"x": x}):
        with pytest.raises((ValueError, TypeError), match=message):
            model(given)
    assert model(np.ones((3, 2), trained_on)).tolist() == [2.0, 2.0, 2.0]


def test_standardized_inputs_stay_finite() -> None:
    inputs = data.Inputs({"x": (2,)}, {"x": "float32"}, {"x": data.Statistics(np.float32(0), np.float32(1e-10))})
    with pytest.raises(ValueError, match="infinite in float32 once they are standardized"):
        data.raw_inputs(np.full((3, 2), 1e35), inputs)
