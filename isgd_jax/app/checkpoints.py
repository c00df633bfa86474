"""One Orbax checkpoint of everything that decides the next step, and the proof that it is whole and of this run.

Orbax's stores say when a file is missing, but read most flipped bits back as other numbers: OCDBT guards its own
nodes, not the arrays. So each checkpoint carries a checksum of every array, and of all that is said beside them.
"""

import datetime
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from isgd_jax.errors import ArgumentError, DamagedFileError

__all__ = ["Checkpoints", "Restored", "Saved", "check_storable", "checksums", "into", "read"]

_LONGEST = 3800
"""Bytes in the name of a folder of checkpoints: Linux takes 4,095 for that of a file, and Orbax's add up to 200."""

Tree = TypeVar("Tree")


Found = TypeVar("Found")


class _Step(ocp.path.step.Metadata):
    """A checkpoint's step and place. Orbax reads the moment as well, before anything else, where a damaged file of one
    checkpoint would take all of them away; nothing here goes by age."""

    @property
    def commit_timestamp(self) -> datetime.datetime:
        """The same for all: what Orbax keeps goes by the step."""
        return datetime.datetime.min


class _Steps(ocp.path.step.NameFormat[_Step]):
    """Checkpoints in folders that are called by their steps, as Orbax's standard has it."""

    _standard = ocp.path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        """The name of the folder of a step."""
        return self._standard.build_name(step)

    def find_all(self, base_path: Any) -> Iterator[_Step]:
        """All checkpoints in a folder."""
        return (_Step(found.step, found.path) for found in self._standard.find_all(base_path))

    def find_step(self, base_path: Any, step: int) -> _Step:
        """The checkpoint of a step; Orbax raises a ValueError where there is none."""
        found = self._standard.find_step(base_path, step)
        return _Step(found.step, found.path)


class Restored(NamedTuple):
    """What a run goes on from."""

    tree: Any
    """The arrays, placed and shaped like the template."""
    notes: dict[str, Any]
    remarks: list[str]
    """What a person should hear of: newer checkpoints that were damaged."""


class Checkpoints:
    """The checkpoints of one run, in one folder, the newest two kept.

    Guarantees:
        * A checkpoint is seen whole or not at all: Orbax writes to a temporary folder and renames it. What a killed
          process left half-written is removed at the next start.
        * What is read back is what was saved, bit for bit: checksums are made before writing and compared after
          reading. A damaged checkpoint is set aside, the last whole one is taken, and `Restored.remarks` says so.
        * Saving is asynchronous and works on a copy: the caller may donate its arrays at once.
        * A checkpoint of another model, optimizer or data set is refused before anything is touched.

    Args:
        folder: where the checkpoints are; made if it is not there.
        identity: what must be equal for a checkpoint to belong here, such as the fingerprint of the data set.
        processes: those of a distributed run that take part, if not all: what they save must be NumPy arrays.

    Raises:
        OSError: the folder cannot be written to.
        ArgumentError: Orbax cannot write to a folder of this name.
    """

    def __init__(self, folder: Path, *, identity: dict[str, str], processes: set[int] | None = None) -> None:
        self._identity = identity
        self._copy = jnp.copy if processes is None else np.copy
        _check_writable(folder)
        members = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes=processes, barrier_sync_key_prefix=None if processes is None else "isgd"
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=members,
            step_name_format=_Steps(),
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or None; whether it is undamaged shows only when it is read."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any, notes: dict[str, Any]) -> None:
        """Save a pytree of arrays, and notes that JSON can hold. Saving a step that is there already does nothing.

        Args:
            step: updates made so far.
            tree: the arrays, on any devices of this process.
            notes: what else the run needs to go on.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints stay as they are.
        """
        if self._manager.latest_step() == step:
            return
        record = _sealed(
            {"identity": self._identity, "arrays": _describe(tree), "sums": checksums(tree), "notes": notes}
        )
        arrays = ocp.args.StandardSave(jax.tree.map(self._copy, tree))
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(arrays=arrays, record=ocp.args.JsonSave(record)))

    def restore(self, template: Any) -> Restored:
        """The newest whole checkpoint, placed and shaped like ``template``.

        Damaged ones that are newer are renamed to ``damaged-STEP``, so that their steps can be saved again.

        Args:
            template: a pytree of arrays of the same shapes and types.

        Raises:
            FileNotFoundError: there is no checkpoint.
            DamagedFileError: there are, and all are damaged.
            ArgumentError: the checkpoint is of another model, optimizer or data set.
        """
        steps = self._manager.all_steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self._manager.directory}: the run saved none; start it anew")

        def read_at(step: int) -> tuple[Any, dict[str, Any]]:
            record = _record(self._manager, step)
            self._check_ours(record)
            _check_same_arrays(record["arrays"], _describe(template))
            with _damage_told():
                wanted = ocp.args.Composite(arrays=ocp.args.StandardRestore(template))
                arrays = self._manager.restore(step, args=wanted).arrays
            _check_sums(arrays, record)
            return arrays, record["notes"]

        (tree, notes), step, damages = _newest_whole(steps, read_at, self._manager.directory)
        remarks = [self._set_aside(at, reason, step) for at, reason in damages.items()]
        return Restored(tree, notes, remarks)

    def discard_from(self, step: int) -> None:
        """Delete the checkpoints of ``step`` and later ones: the loss of their parameters is not finite.

        Args:
            step: updates made at the first bad one. Earlier checkpoints stay, and the run can go on from them.
        """
        self._manager.wait_until_finished()
        for at in self._manager.all_steps():
            if at >= step:
                self._manager.delete(at)

    def _check_ours(self, record: dict[str, Any]) -> None:
        for what, ours in self._identity.items():
            theirs = record["identity"].get(what)
            if theirs != ours:
                raise ArgumentError(
                    f"the checkpoint is of another {what}: it has {theirs}, this run has {ours}; go on with the data "
                    "and the version of isgd_jax that it was written with, or begin a new run"
                )

    def _set_aside(self, step: int, reason: str, used: int) -> str:
        folder = Path(self._manager.directory)
        aside = folder / f"damaged-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.move(folder / str(step), aside)  # some file systems of containers rename no folder: EXDEV
        self._manager.reload()
        return (
            f"the checkpoint of step {step} is damaged ({reason}) and was set aside as {aside}: "
            f"the run goes on from the one of step {used}, and makes the updates since then again"
        )

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
            where = self._manager.directory
            raise OSError(f"cannot write a checkpoint to {where} ({_reason(error)}): {self._kept()}") from error

    def _kept(self) -> str:
        """What stays where a checkpoint cannot be written, and what to do."""
        folder = self._manager.directory
        if not folder.is_dir():
            return "the folder is gone; put it back and resume"
        whole = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
        kept = f"the one of step {max(whole)} stays" if whole else "none was saved before"
        return f"{kept}; make room and resume"


def _reason(error: Exception) -> str:
    """What the system said, where it can be told from what Orbax and tensorstore say around it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = re.findall(r"([^:]+?) \[os_error_code=", str(error))
    return said[-1].strip() if said else " ".join(str(error).split())[:200] or type(error).__name__


class Saved(NamedTuple):
    """A checkpoint as it lies on disk: nested dicts and lists of NumPy arrays, a named tuple as a dict."""

    step: int
    tree: dict[str, Any]
    notes: dict[str, Any]
    identity: dict[str, str]
    remarks: list[str]
    """What a person should hear of: newer checkpoints that are damaged."""


def read(folder: Path, *, only: Sequence[str] = ()) -> Saved | None:
    """The newest whole checkpoint in a folder, for looking at: no model is built, nothing is written.

    A run may be writing to the folder meanwhile.

    Args:
        folder: where the checkpoints are.
        only: parts of the tree that are read, such as ``"state/sampler/table"``; what is not there is left out.
            Everything, if none is named.

    Returns:
        None if there is none.

    Raises:
        DamagedFileError: there are checkpoints, and all are damaged.
        ArgumentError: Orbax cannot read from a folder of this name.
    """
    if not folder.is_dir():
        return None
    _check_name(folder)
    handlers: Any = {"arrays": ocp.PyTreeCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(read_only=True, step_name_format=_Steps())
    with ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers) as manager:
        steps = manager.all_steps()
        if not steps:
            return None

        def read_at(step: int) -> tuple[Any, dict[str, Any]]:
            record = _record(manager, step)
            with _damage_told():
                tree = _part(manager, step, only)
            _check_sums(tree, record, only)
            return tree, record

        (tree, record), step, damages = _newest_whole(steps, read_at, folder)
    remarks = [
        f"the checkpoint of step {at} is damaged ({reason}): this is the one of step {step}"
        for at, reason in damages.items()
    ]
    return Saved(step, tree, record["notes"], record["identity"], remarks)


def _part(manager: ocp.CheckpointManager, step: int, only: Sequence[str]) -> Any:
    """The arrays of these parts as Orbax's own partial restore has them."""
    described = manager.item_metadata(step)["arrays"].tree
    if only:
        described = _pruned(described, only, "")
    template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), described)
    how = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), template)
    wanted = ocp.args.PyTreeRestore(template, restore_args=how, partial_restore=True)
    return manager.restore(step, args=ocp.args.Composite(arrays=wanted)).arrays


def _pruned(tree: Any, only: Sequence[str], here: str) -> Any:
    """The branches of nested dicts that lead to one of these parts, or lie in it."""
    kept = {}
    for name, inside in tree.items():
        path = f"{here}{name}"
        if _lies_in(path, only):
            kept[name] = inside
        elif isinstance(inside, dict) and any(part.startswith(f"{path}/") for part in only):
            kept[name] = _pruned(inside, only, f"{path}/")
    return kept


def _lies_in(path: str, parts: Sequence[str]) -> bool:
    return any(path == part or path.startswith(f"{part}/") for part in parts)


def into(template: Tree, tree: Any) -> Tree:
    """The arrays of ``tree`` in the shape of ``template``; dtypes are those on disk.

    Args:
        template: a pytree of arrays or their shapes: named tuples, dicts, lists.
        tree: nested dicts and lists as `read` gives them. What the template does not name is left out.

    Raises:
        ValueError: an array is missing or has another shape; the message names it.
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
                f"the checkpoint is of another model or optimizer: {where} is {shape}, not {leaf.shape}"
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
                f"the checkpoint is of another model or optimizer: {name} is {theirs.get(name, 'absent')} there "
                f"and {ours.get(name, 'absent')} here; resume with the configuration the run was started with"
            )


def check_storable(tree: Any) -> None:
    """Refuse arrays that Orbax does not save, or not apart from others; before the first step.

    Args:
        tree: of arrays, or their shapes.

    Raises:
        ArgumentError: an array has no numbers, or two have the same name once their places are joined by dots.
    """
    places: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        place, name = jax.tree_util.keystr(path), ".".join(map(_name, path))
        if 0 in leaf.shape:
            raise ArgumentError(
                f"{place} is {leaf.dtype}{list(leaf.shape)}, an array without numbers, which cannot be saved in a "
                "checkpoint: leave it out of the model"
            )
        if name in places:
            raise ArgumentError(
                f"{places[name]} and {place} would be one array in a checkpoint, {name}: name one otherwise"
            )
        places[name] = place


def _check_name(folder: Path) -> None:
    """Orbax takes names for UTF-8, whatever the system's encoding is; of others it makes names of its own."""
    name = str(folder.absolute())
    try:
        is_utf8 = name.encode() == os.fsencode(name)
    except UnicodeEncodeError:
        is_utf8 = False
    if not is_utf8:
        how = "" if sys.getfilesystemencoding() == "utf-8" else ", or set PYTHONUTF8=1 where it is in UTF-8"
        raise ArgumentError(f"no checkpoints can lie in {name!r}: Orbax needs a name in UTF-8; name another{how}")


def _check_writable(folder: Path) -> None:
    """Before the first step rather than at the first save."""
    _check_name(folder)
    if len(os.fsencode(folder.absolute())) > _LONGEST:
        raise ArgumentError(
            f"the name of the folder {str(folder.absolute())[:40]!r}... is longer than {_LONGEST:,} bytes, which "
            "leaves no room for the names of the files in a checkpoint: name another"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise type(error)(
            f"cannot write checkpoints to {folder} ({error.strerror or error}): make room there, make it writable, or "
            "name another folder for the run"
        ) from error


def _newest_whole(
    steps: Sequence[int], read_at: Callable[[int], Found], folder: Any
) -> tuple[Found, int, dict[int, str]]:
    """What the newest readable checkpoint gives, its step, and the reasons why newer ones do not."""
    damages: dict[int, str] = {}
    for step in sorted(steps, reverse=True):
        try:
            return read_at(step), step, damages
        except DamagedFileError as error:
            damages[step] = str(error)
    told = "; ".join(f"step {step}: {reason}" for step, reason in damages.items())
    raise DamagedFileError(
        f"every checkpoint in {folder} is damaged ({told}): bring the folder back from a copy, or start the run anew"
    )


def _record(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        DamagedFileError: it cannot be read, or is not what was written.
    """
    with _damage_told():
        record = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
    if not isinstance(record, dict) or record.get("seal") != _seal(record):
        raise DamagedFileError("its record has another checksum than when it was written, or none")
    return record


@contextmanager
def _damage_told() -> Iterator[None]:
    """What Orbax and tensorstore stumble over in a damaged folder has every type that there is."""
    try:
        yield
    except (PermissionError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedFileError(f"it cannot be read: {reason}") from error


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON will give it back, and its checksum."""
    record = json.loads(json.dumps(record))
    return record | {"seal": _seal(record)}


def _seal(record: dict[str, Any]) -> int:
    """The checksum of a record but for the checksum itself."""
    content = {name: value for name, value in record.items() if name != "seal"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def checksums(tree: Any) -> dict[str, int]:
    """CRC-32 of each array's bytes, by its place."""
    return {_place(path): _checksum(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _checksum(leaf: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)


def _place(path: tuple[Any, ...]) -> str:
    """``state/opt_state/0/mu``: the same of a named tuple and of the dict that it is on disk."""
    return "/".join(_name(key) for key in path)


def _name(key: Any) -> str:
    return str(next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)))


def _check_sums(tree: Any, record: dict[str, Any], only: Sequence[str] = ()) -> None:
    """What was read is what was written, and all of it: Orbax leaves out what its own list of arrays does not name.

    Raises:
        DamagedFileError: an array has other bytes, or is missing.
    """
    found, written = checksums(tree), record["sums"]
    asked = [place for place in written if not only or _lies_in(place, only)]
    for place in dict.fromkeys([*found, *asked]):
        if place not in found:
            raise DamagedFileError(f"{place} is missing, which was saved")
        if written.get(place) != found[place]:
            raise DamagedFileError(f"{place} has other bytes than were saved")
