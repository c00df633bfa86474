"""What the user brings beside the data: numbers an example, and functions by name. Checked before the first step."""

from pathlib import Path

import numpy as np


def numbers(path: str, num_examples: int, *, flag: str, allow_negative: bool = False) -> np.ndarray:
    """The ``num_examples`` finite numbers in a .npy file, as float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; ``flag`` names the option in the message.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{flag}: there is no file {path}")
    found = np.load(path, allow_pickle=False)
    if found.shape != (num_examples,) or not np.issubdtype(found.dtype, np.number):
        raise ValueError(
            f"{flag}: expected {num_examples} numbers, one for each training example, got {found.dtype}"
            f"{list(found.shape)} in {path}"
        )
    values = found.astype(np.float32)
    if not np.isfinite(values).all() or not (allow_negative or (values >= 0).all()):
        raise ValueError(f"{flag}: expected finite numbers{'' if allow_negative else ' of at least 0'} in {path}")
    return values
