"""Street View House Numbers, cropped to 32x32: train and extra together, as the paper trains on them."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from isgd_jax.app.data.recipe import RawFile, Recipe, Splits, hold_out
from isgd_jax.errors import ArgumentError

__all__ = ["SVHN_CROPPED", "parsed", "read_mat"]


def read_mat(path: Path) -> dict[str, np.ndarray]:
    """Images [n, 32, 32, 3] and labels [n] of one ``.mat`` file, which keeps examples last and calls zero 10.

    Raises:
      FileNotFoundError: there is no such file.
      ArgumentError: it is damaged, or of another kind.
    """
    _check_parses(path)
    return parsed(path)


def parsed(path: Path) -> dict[str, np.ndarray]:
    """`read_mat` of a file on which SciPy's parser is known to come to an end: of some damaged files it never returns.

    Raises:
      FileNotFoundError: there is no such file.
      ArgumentError: it is damaged, or of another kind.
    """
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=["X", "y"])
        images, labels = np.moveaxis(content["X"], -1, 0), content["y"].reshape(-1)
    except Exception as error:  # scipy raises whatever its parser stumbles over
        raise ArgumentError(f"{path} is cut short, damaged, or no .mat file with X and y ({error})") from error
    if images.shape[1:] != (32, 32, 3) or images.dtype != np.uint8:
        raise ArgumentError(f"{path}: expected X to be uint8[32, 32, 3, n], got {images.dtype}{content['X'].shape}")
    return {"image": images, "label": labels.astype(np.int32) % 10}


def _check_parses(path: Path) -> None:
    """See that SciPy's parser comes to an end: of some damaged files it ends the process, so another one goes first.

    Raises:
      ArgumentError: it does not.
    """
    parse = "import sys, scipy.io; scipy.io.loadmat(sys.argv[1], variable_names=['X', 'y'])"
    ended = subprocess.run([sys.executable, "-c", parse, str(path)], capture_output=True, check=False).returncode
    if ended not in (0, 1):  # 1 is an exception, which is told where it comes up here
        raise ArgumentError(f"{path} is damaged: SciPy's parser crashes on it (exit code {ended}); fetch it again")


def _read(files: Mapping[str, Path]) -> Splits:
    """5 % of train and extra held out, as in the paper (section "Experiments"); which 5 % it does not say."""
    train, extra, test = (read_mat(files[f"{part}_32x32.mat"]) for part in ("train", "extra", "test"))
    both = {key: np.concatenate([train[key], extra[key]]) for key in train}
    kept, held = hold_out(both, -(-len(both["label"]) // 20))
    return {"train": kept, "valid": held, "test": test}


_URL = "http://ufldl.stanford.edu/housenumbers/"

SVHN_CROPPED = Recipe(
    name="svhn_cropped",
    version="1.0.0",
    about="House numbers, 32x32 pixels in colour (Netzer et al. 2011); train and extra, 5 % of them held out.",
    homepage=_URL,
    num_classes=10,
    counts={"train": 574_168, "valid": 30_220, "test": 26_032},
    read=_read,
    files=(
        RawFile(
            "train_32x32.mat",
            _URL + "train_32x32.mat",
            "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        ),
        RawFile(
            "extra_32x32.mat",
            _URL + "extra_32x32.mat",
            "a133a4beb38a00fcdda90c9489e0c04f900b660ce8a316a5e854838379a71eb3",
        ),
        RawFile(
            "test_32x32.mat",
            _URL + "test_32x32.mat",
            "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        ),
    ),
    per_coordinate=True,
)
