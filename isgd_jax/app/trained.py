"""The model that a run has trained, ready to predict: raw inputs in, outputs out.

>>> from isgd_jax.app import trained
>>> model = trained.load("runs/mine")  # doctest: +SKIP
>>> logits = model(images)  # doctest: +SKIP
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from isgd_jax.app import checkpoints, data, models
from isgd_jax.app.run_dir import RunDir
from isgd_jax.errors import ArgumentError
from isgd_jax.types import Params

__all__ = ["Trained", "load"]

_SLICE = 1024
"""Examples that are computed at a time."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A model with its parameters and what is done to its inputs. Call it with raw inputs.

    Attributes:
      model: anything with Linen's ``apply``, for one example.
      params: its parameters at the checkpoint.
      inputs: what is done to the inputs before the model sees them.
      step: updates made up to the checkpoint.
      remarks: what a person should hear of: newer checkpoints that are damaged.
    """

    model: models.Model
    params: Params
    inputs: data.Inputs
    step: int
    remarks: tuple[str, ...] = ()

    def __call__(self, x: Any) -> np.ndarray:
        """The outputs [n, ...] for raw inputs [n, ...], such as logits [n, classes].

        Args:
          x: as the training set had them: the one input, or a dict of the inputs; a ``label`` in it is left out.

        Raises:
          TypeError: an input is of another kind of numbers than the run was trained on.
          ValueError: an input is missing, unknown, of another shape or length than the others, or has numbers that are
            not finite or do not fit.
        """
        given = data.raw_inputs(x, self.inputs)

        @jax.jit
        def outputs(params: Params, batch: Any) -> Any:
            return jax.vmap(lambda one: self.model.apply({"params": params}, self.inputs.of(one)))(batch)

        size = len(next(iter(given.values())))
        slices = [{name: array[at : at + _SLICE] for name, array in given.items()} for at in range(0, size, _SLICE)]
        return np.concatenate([np.asarray(outputs(self.params, one)) for one in slices])


def load(run: str | Path, *, model: models.Model | None = None) -> Trained:
    """The model of a run's newest whole checkpoint.

    Args:
      run: its folder. **The model that config.json names is imported and run**: read a stranger's first.
      model: takes the place of that model; needed where the run was given one from Python.

    Raises:
      FileNotFoundError: this is not the folder of a run, or it has no checkpoint yet.
      ValueError: its files are damaged, or the model is not that of the checkpoint.
    """
    folder = RunDir(Path(run))
    config = folder.read_config()
    saved = checkpoints.read(folder.own_checkpoints(), only=("state/params",))
    if saved is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet: wait for the first")
    folder.own(data.INPUTS_FILE)
    inputs = data.read_inputs(folder.path)
    if model is None:
        num_classes = folder.environment().get("num_classes")
        if num_classes is None:
            raise ArgumentError(
                f"{run} does not say of how many classes its model is (num_classes in environment.json): bring that "
                "file back, or give the model in Python, to isgd_jax.app.trained.load"
            )
        options = {"hidden": config.model.hidden, "initializer": config.model.initializer}
        model = models.by_name(config.model.model, num_classes, **(options if config.model.model == "mlp" else {}))
    example = {name: np.zeros(shape, inputs.dtypes[name]) for name, shape in inputs.shapes.items()}
    given = jax.tree.map(jax.numpy.asarray, inputs.of(example))
    made = model
    template = jax.eval_shape(lambda key: models.init(made, key, given), jax.random.key(0))
    params = checkpoints.into(template, saved.tree["state"]["params"])
    return Trained(model, params, inputs, saved.step, tuple(saved.remarks))
