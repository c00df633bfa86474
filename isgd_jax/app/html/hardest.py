"""The examples that a run finds hardest: those with the largest scores at its newest checkpoint."""

import base64
import io
from typing import Any, NamedTuple

import numpy as np

from isgd_jax.app import checkpoints, data
from isgd_jax.app.config import Config
from isgd_jax.app.data import Dataset
from isgd_jax.app.run_dir import RunDir
from isgd_jax.sampling import score_table

__all__ = ["Hard", "Scores", "data_uri", "is_image", "scores"]


class Hard(NamedTuple):
    """One example."""

    example: int
    label: int
    score: float
    """As it was last measured."""
    times_mean: float
    """Its score over the mean score."""
    age: int
    """Updates since it was measured."""
    picture: str | None
    """A data URI, where the input is an image."""
    values: str | None
    """The first coordinates, where it is not."""


class Scores(NamedTuple):
    """What the table knew at a checkpoint: the scores [m] of the examples that have one, and the hardest of them."""

    step: int
    known: np.ndarray
    num_examples: int
    probs: np.ndarray | None
    """That examples are drawn with [n], in the order of their line; None where the checkpoint does not say."""
    hardest: list[Hard]
    remarks: list[str]
    """Why labels and pictures are missing, if they are; which checkpoints were damaged."""


def scores(run: RunDir, *, count: int = 24) -> Scores | None:
    """The table of the run's newest whole checkpoint. None if there is no checkpoint, or a run without scores.

    Args:
        run: the folder, which may be a stranger's: nothing is written, imported or downloaded for it.
        count: how many of the hardest examples.

    Raises:
        ArgumentError: every checkpoint is damaged, or behind a link that leads out of the folder.
    """
    saved = checkpoints.read(run.own_checkpoints(), only=("state/sampler/table", "state/sampler/proposal/law/masses"))
    state = {} if saved is None else saved.tree.get("state", {}).get("sampler", {})
    found = state.get("table")
    if saved is None or not isinstance(found, dict) or not {"scores", "versions"} <= set(found):
        return None
    measured = np.flatnonzero(found["versions"] != score_table.NEVER)
    if not len(measured):
        return None
    dataset, remark = _dataset(run.read_config(), saved.identity.get("data set"))
    values = found["scores"][measured]
    first = [int(i) for i in measured[np.argsort(-values, kind="stable")[:count]]]
    mean = float(values.mean()) or 1.0
    hardest = [
        Hard(i, -1, float(found["scores"][i]), float(found["scores"][i]) / mean, _age(saved, found, i), None, None)
        for i in first
    ]
    if dataset is not None:
        hardest = [_seen(hard, dataset) for hard in hardest]
    remarks = [*saved.remarks, *([] if remark is None else [remark])]
    masses = state.get("proposal", {}).get("law", {}).get("masses")
    probs = None if masses is None else np.asarray(masses, np.float64) / np.sum(masses, dtype=np.float64)
    return Scores(saved.step, values, len(found["scores"]), probs, hardest, remarks)


def _age(saved: checkpoints.Saved, found: dict[str, Any], i: int) -> int:
    return int(saved.step - found["versions"][i])


def _dataset(config: Config, fingerprint: str | None) -> tuple[Dataset | None, str | None]:
    """The run's training examples, or the reason why they are not to be had."""
    try:
        dataset = data.load(config.data.dataset, data_dir=config.data.data_dir, prepare=False)
    except (OSError, ValueError, ImportError) as error:
        return None, f"Labels and pictures are missing: the data set was not read ({error})."
    if dataset.fingerprint != fingerprint:
        return None, (
            f"Labels and pictures are missing: the run was trained on other examples than the data set "
            f"{config.data.dataset!r} has here, such as arrays given to fit."
        )
    return dataset, None


def _seen(hard: Hard, dataset: Dataset) -> Hard:
    inputs = dataset.train[dataset.input_key][hard.example]
    label = int(dataset.train["label"][hard.example])
    if is_image(inputs):
        return hard._replace(label=label, picture=data_uri(inputs, white=float(dataset.train[dataset.input_key].max())))
    flat = np.ravel(inputs)
    text = ", ".join(f"{x:.3g}" for x in flat[:8]) + (", …" if len(flat) > 8 else "")
    return hard._replace(label=label, values=text)


def is_image(array: np.ndarray) -> bool:
    """Whether an input is a picture: [height, width] or [height, width, 1, 3 or 4], and of more than a few pixels."""
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        return False
    return array.ndim in (2, 3) and min(array.shape[:2]) >= 4


def data_uri(image: np.ndarray, *, white: float) -> str:
    """A picture as PNG in a data URI, so that the page needs no file beside it.

    Args:
        image: [height, width] or [height, width, 1, 3 or 4], of any numbers.
        white: the value that is drawn white; black is 0, or the least value of the picture if that is less. What is
            beyond is cut.
    """
    from PIL import Image

    black = min(0.0, float(image.min()))
    image = np.clip(255 * (image - black) / ((white - black) or 1.0), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
