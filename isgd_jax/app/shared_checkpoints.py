"""The checkpoints of a run that several processes make together."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from isgd_jax.app.checkpoints import Checkpoints, Restored

__all__ = ["SharedCheckpoints", "of_run"]


class SharedCheckpoints:
    """Checkpoints that process 0 alone writes and reads: the others get what they hold over the network.

    So the folder need not be on storage that all hosts see. Arrays that are split over devices are gathered one at a
    time: no device holds more than one whole array, and the memory of each host holds them all.
    """

    def __init__(self, folder: Path, *, identity: dict[str, str]) -> None:
        first = jax.process_index() == 0
        self._own = Checkpoints(folder, identity=identity, processes={0}) if first else None

    def latest_step(self) -> int | None:
        """Of the newest whole checkpoint, or None."""
        own = None if self._own is None else self._own.latest_step()
        step = int(_of_first(np.int32(-1 if own is None else own)))
        return None if step < 0 else step

    def save(self, step: int, tree: Any, notes: dict[str, Any]) -> None:
        """Save arrays of all processes, which all call it; process 0 writes, and nobody waits for it.

        Args:
            step: updates made so far.
            tree: the arrays, whole on each process or split over the devices of all.
            notes: what else the run needs to go on, as JSON can hold it.

        Raises:
            OSError: in process 0 alone: the disk is full or not writable.
        """
        tree = jax.tree.map(_whole, tree)
        if self._own is not None:
            self._own.save(step, tree, notes)

    def restore(self, template: Any) -> Restored:
        """The newest whole checkpoint, as NumPy arrays on every process.

        Args:
            template: a pytree of arrays of the same shapes and types.

        Raises:
            FileNotFoundError: there is no checkpoint.
            DamagedFileError: there are, and all are damaged.
            ArgumentError: the checkpoint is of another model, optimizer or data set.
        """
        arrays, beside = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template), b""
        if self._own is not None:
            arrays, *found = self._own.restore(arrays)
            beside = json.dumps(found).encode()
        text = np.zeros(_of_first(np.int32(len(beside))), np.uint8)
        text[: len(beside)] = np.frombuffer(beside, np.uint8)
        notes, remarks = json.loads(_of_first(text).tobytes())
        return Restored(_of_first(arrays), notes, remarks)

    def discard_from(self, step: int) -> None:
        """Delete the checkpoints of ``step`` and later ones."""
        if self._own is not None:
            self._own.discard_from(step)

    def wait(self) -> None:
        """Return when the last save is on disk."""
        if self._own is not None:
            self._own.wait()

    def close(self) -> None:
        """Finish the last save."""
        if self._own is not None:
            self._own.close()


def of_run(folder: Path, *, identity: dict[str, str]) -> Checkpoints | SharedCheckpoints:
    """The checkpoints of a run, of one process or several.

    Args:
        folder: where they are, of process 0; it is made if need be.
        identity: what must be equal for a checkpoint to belong to the run, by name.

    Raises:
        OSError: the folder cannot be written to.
    """
    return (Checkpoints if jax.process_count() == 1 else SharedCheckpoints)(folder, identity=identity)


def _whole(x: Any) -> np.ndarray:
    """An array in the memory of the host; a collective where no process holds all of it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _of_first(tree: Any) -> Any:
    """What process 0 has, on all: NumPy arrays of equal shapes, bit for bit.

    Bytes are sent: JAX sums numbers over the processes, which makes 0.0 of -0.0 and of what is below 1e-38.
    """

    def one(x: Any) -> np.ndarray:
        array = np.asarray(x)
        sent = np.frombuffer(array.tobytes(), np.uint8)
        found = np.asarray(multihost_utils.broadcast_one_to_all(sent)) if array.size else sent
        return found.view(array.dtype).reshape(array.shape)

    return jax.tree.map(one, tree)
