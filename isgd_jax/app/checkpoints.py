"""One Orbax checkpoint of everything that decides the next step, and the proof that it belongs to this run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from isgd_jax.errors import ArgumentError

Tree = TypeVar("Tree")


class Checkpoints:
    """The checkpoints of one run, in one folder, the newest two kept.

    Guarantees:
        * A checkpoint is seen whole or not at all: Orbax writes to a temporary folder and renames it. What a killed
          process left half-written is removed at the next start.
        * Saving is asynchronous and works on a copy: the caller may donate its arrays at once.
        * A checkpoint of another model, optimiser or data set is refused before anything is touched.

    Args:
        folder: where the checkpoints are.
        identity: what must be equal for a checkpoint to belong here, such as the fingerprint of the data set.
        processes: those of a distributed run that take part, if not all: what they save must be NumPy arrays.
    """

    def __init__(self, folder: Path, *, identity: dict[str, str], processes: set[int] | None = None) -> None:
        self._identity = identity
        self._copy = jnp.copy if processes is None else np.copy
        folder.mkdir(parents=True, exist_ok=True)
        members = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes=processes, barrier_sync_key_prefix=None if processes is None else "isgd"
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=True, create=False, multiprocessing_options=members
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Tree, notes: dict[str, Any]) -> None:
        """Save a pytree of arrays, and notes that JSON can hold. Saving a step that is there already does nothing.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints stay as they are.
        """
        if self._manager.latest_step() == step:
            return
        record = {"identity": self._identity, "arrays": _describe(tree), "notes": notes}
        arrays = ocp.args.StandardSave(jax.tree.map(self._copy, tree))
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(arrays=arrays, record=ocp.args.JsonSave(record)))

    def restore(self, template: Tree) -> tuple[Tree, dict[str, Any]]:
        """The newest checkpoint, placed and shaped like ``template``.

        Returns:
            The saved pytree and the notes.

        Raises:
            FileNotFoundError: there is no whole checkpoint.
            ValueError: the checkpoint is of another model, optimiser or data set.
        """
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self._manager.directory}: the run saved none; start it anew")
        record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
        for what, ours in self._identity.items():
            theirs = record["identity"].get(what)
            if theirs != ours:
                raise ArgumentError(f"the checkpoint is of another {what}: it has {theirs}, this run has {ours}")
        _check_same_arrays(record["arrays"], _describe(template))
        restored = self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(template)))
        return restored.arrays, record["notes"]

    def wait(self) -> None:
        """Return when the last save is on disk.

        Raises:
            OSError: it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish the last save and release the folder.

        Raises:
            OSError: the last save could not be written.
        """
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Orbax reports what the file system refuses, now or at the save before, as one of several types."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1].rsplit(": ", 1)[-1]
            whole = [int(path.name) for path in self._manager.directory.iterdir() if path.name.isdigit()]
            kept = f"the one of step {max(whole)} stays; make room and resume" if whole else "none was saved before"
            raise OSError(f"cannot write a checkpoint to {self._manager.directory} ({reason}): {kept}") from error


class Saved(NamedTuple):
    """A checkpoint as it lies on disk: nested dicts and lists of NumPy arrays, a named tuple as a dict."""

    step: int
    tree: dict[str, Any]
    notes: dict[str, Any]
    identity: dict[str, str]


def read(folder: Path) -> Saved | None:
    """The newest checkpoint in a folder, for looking at: no model is built, nothing is written. None if there is none.

    A run may be writing to the folder meanwhile.
    """
    if not folder.is_dir():
        return None
    handlers: Any = {"arrays": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        described = manager.item_metadata(step)["arrays"]
        template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), described.tree)
        wanted = ocp.args.Composite(arrays=ocp.args.StandardRestore(template), record=ocp.args.JsonRestore())
        saved = manager.restore(step, args=wanted)
    return Saved(step, saved.arrays, saved.record["notes"], saved.record["identity"])


def into(template: Tree, tree: Any) -> Tree:
    """The arrays of ``tree``, nested dicts and lists as `read` gives them, in the shape of ``template``.

    Raises:
        ValueError: an array is missing or has another shape.
    """

    def find(path: tuple[Any, ...], leaf: Any) -> Any:
        found = tree
        for key in path:
            name = next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind))
            inside = found.get(name) if isinstance(found, dict) else None
            found = found[name] if isinstance(found, list) and name < len(found) else inside
        shape = getattr(found, "shape", "no array")
        if shape != leaf.shape:
            where = jax.tree_util.keystr(path)
            raise ArgumentError(
                f"the checkpoint is of another model or optimiser: {where} is {shape}, not {leaf.shape}"
            )
        return jnp.asarray(found)

    return jax.tree_util.tree_map_with_path(find, template)


def _describe(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _check_same_arrays(theirs: dict[str, str], ours: dict[str, str]) -> None:
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise ArgumentError(
                f"the checkpoint is of another model or optimiser: {name} is {theirs.get(name, 'absent')} there "
                f"and {ours.get(name, 'absent')} here; resume with the configuration the run was started with"
            )
