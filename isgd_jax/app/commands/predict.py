"""`isgd predict`: the outputs of a run's model for inputs in a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from isgd_jax.errors import ArgumentError

__all__ = ["Predict", "run"]


@dataclass(frozen=True)
class Predict:
    """Write the outputs of a run's model, at its newest checkpoint, for raw inputs in a file.

    What was done to the inputs in training is done again. In Python: isgd_jax.app.trained.load(RUN)(inputs).

    Attributes:
        folder: Folder of the run.
        inputs: A .npy file of inputs [n, ...], or a .npz file with an array for each input by its name.
        out: File of the outputs [n, ...]. Default: the name of the inputs with -outputs.npy.
    """

    folder: Annotated[str, tyro.conf.Positional]
    inputs: Annotated[str, tyro.conf.Positional]
    out: str | None = None


def run(command: Predict) -> int:
    """Run `isgd predict`: write the outputs; returns the exit code.

    Raises:
        FileNotFoundError: there is no such file, run or checkpoint.
        ValueError: the inputs are not those of the model, or a file is damaged.
    """
    import numpy as np

    from isgd_jax.app import trained

    file = Path(command.inputs)
    try:
        found = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ArgumentError(f"{file} cannot be read ({error}): expected a .npy or .npz file") from error
    inputs = found if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    model = trained.load(command.folder)
    outputs = model(inputs)
    out = Path(command.out) if command.out else file.with_name(f"{file.stem}-outputs.npy")
    np.save(out, outputs)
    print(f"{out}: outputs {list(outputs.shape)}, of the parameters at update {model.step:,}")
    return 0
