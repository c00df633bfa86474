"""The model of a run, in Python and as a command: raw inputs give the outputs that training measured."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from problems import blobs, small_config

from isgd_jax.app import trained
from isgd_jax.app.commands import predict
from isgd_jax.app.run import fit


@pytest.mark.slow
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
