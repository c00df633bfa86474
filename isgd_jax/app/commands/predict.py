"""`isgd predict`: the outputs of a run's model for inputs in a file."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from isgd_jax.app.files import write_named
from isgd_jax.errors import ArgumentError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Predict", "read_inputs", "run"]


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

    The inputs are read without pickle. The file of the outputs, ``--out`` or the name of the inputs with
    ``-outputs.npy``, is written over. The model that the run's configuration names is imported, and is named before.
    Where the newest checkpoint is damaged, the one before is taken, and standard error has that.

    Raises:
        FileNotFoundError: there is no such file, run or checkpoint.
        TypeError, ValueError: the inputs are not those of the model, or a file is damaged.
    """
    import numpy as np

    from isgd_jax.app import trained

    file = Path(command.inputs)
    inputs = read_inputs(file)
    model = trained.load(command.folder)
    for remark in model.remarks:
        print(f"isgd: {remark}", file=sys.stderr, flush=True)
    outputs, content = model(inputs), io.BytesIO()
    np.save(content, outputs)
    out = Path(command.out) if command.out else file.with_name(f"{file.stem}-outputs.npy")
    write_named(out, content.getvalue())
    print(f"{out}: outputs {list(outputs.shape)}, of the parameters at update {model.step:,}")
    return 0


def read_inputs(file: Path) -> "np.ndarray | dict[str, np.ndarray]":
    """The inputs in a file: the array of a .npy file, or those of a .npz file by name.

    Raises:
        FileNotFoundError: there is no such file.
        ArgumentError: it is damaged, of another kind, or holds other things than numbers of examples.
    """
    import numpy as np

    try:
        found = np.load(file, allow_pickle=False)
        inputs = found if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except (FileNotFoundError, PermissionError, IsADirectoryError, MemoryError):
        raise
    except Exception as error:  # NumPy and zipfile raise whatever they stumble over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArgumentError(f"{file} cannot be read ({reason}): expected a .npy or .npz file of numbers") from error
    for name, array in inputs.items() if isinstance(inputs, dict) else [("the array", inputs)]:
        if array.dtype.kind not in "biuf" or array.ndim == 0:
            raise ArgumentError(
                f"{name} in {file} must be numbers [n, ...], one row for each example; got "
                f"{array.dtype}{list(array.shape)}"
            )
    return inputs
