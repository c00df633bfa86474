import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax.app import checkpoints as checkpoints_module
from isgd_jax.app.checkpoints import Checkpoints
from isgd_jax.app.config import configure
from isgd_jax.app.run_dir import RunDir
from isgd_jax.errors import ArgumentError, DamagedFileError

IDENTITY = {"data set": "abc"}


def tree() -> dict[str, jax.Array]:
    return {"weights": jnp.arange(6.0).reshape(2, 3), "count": jnp.int32(4)}


def saved(folder: Path, steps: tuple[int, ...] = (5,)) -> Checkpoints:
    checkpoints = Checkpoints(folder, identity=IDENTITY)
    for step in steps:
        checkpoints.save(step, tree(), {"cursor": step})
    checkpoints.wait()
    return checkpoints


def test_arrays_and_notes_come_back_bit_for_bit(tmp_path: Path) -> None:
    saved(tmp_path).close()
    restored, notes, remarks = Checkpoints(tmp_path, identity=IDENTITY).restore(jax.tree.map(jnp.zeros_like, tree()))
    chex.assert_trees_all_equal(restored, tree())
    assert (notes, remarks) == ({"cursor": 5}, [])


def test_the_caller_may_donate_what_it_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, identity=IDENTITY)
    state = tree()
    checkpoints.save(1, state, {})
    jax.block_until_ready(jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(state))
    checkpoints.wait()
    chex.assert_trees_all_equal(checkpoints.restore(tree())[0], tree())


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, (1, 2, 3))
    assert checkpoints.latest_step() == 3
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"data set": "xyz"}, "the checkpoint is of another data set: it has abc, this run has xyz"),
        ({"format": "2"} | IDENTITY, "the checkpoint is of another format: it has None, this run has 2"),
    ],
)
def test_another_data_set_or_format_is_refused(tmp_path: Path, identity: dict[str, str], message: str) -> None:
    saved(tmp_path).close()
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path, identity=identity).restore(tree())


def test_another_model_is_refused_by_the_name_of_the_array(tmp_path: Path) -> None:
    saved(tmp_path).close()
    with pytest.raises(ValueError, match=r"of another model or optimizer: \['weights'\] is float32\[2, 3\] there"):
        Checkpoints(tmp_path, identity=IDENTITY).restore(tree() | {"weights": jnp.zeros((2, 4))})


def test_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*start it anew"):
        Checkpoints(tmp_path, identity=IDENTITY).restore(tree())


def test_what_a_kill_left_half_written_is_not_read(tmp_path: Path) -> None:
    saved(tmp_path, (1,)).close()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2.orbax-checkpoint-tmp" / "arrays").mkdir()
    assert Checkpoints(tmp_path, identity=IDENTITY).latest_step() == 1


class Pair(NamedTuple):
    first: jax.Array
    second: tuple[jax.Array, ...]


def test_parts_are_read_alone_whatever_they_lie_in(tmp_path: Path) -> None:
    whole = {"state": {"pair": Pair(jnp.arange(3), (jnp.ones(2), jnp.bfloat16(3.0))), "other": jnp.zeros(1)}}
    with_parts = Checkpoints(tmp_path, identity=IDENTITY)
    with_parts.save(1, whole, {})
    with_parts.close()
    found = checkpoints_module.read(tmp_path, only=("state/pair", "state/nowhere"))
    assert found is not None
    assert set(found.tree["state"]) == {"pair"}
    chex.assert_trees_all_equal(checkpoints_module.into({"state": {"pair": whole["state"]["pair"]}}, found.tree), {
        "state": {"pair": whole["state"]["pair"]}
    })  # fmt: skip


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.usefixtures("failed_reads")
def test_no_flipped_bit_is_read_back_as_another_number(tmp_path: Path) -> None:
    """In any file of the newest checkpoint: its numbers come back, or those of the one before, and that is told."""
    saved(tmp_path / "good", (1,)).close()
    other = Checkpoints(tmp_path / "good", identity=IDENTITY)
    noise = {"weights": jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32), "count": jnp.int32(5)}
    other.save(2, noise, {"cursor": 2})
    other.close()
    rng, told = random.Random(0), 0
    for trial in range(40):
        copy = tmp_path / str(trial)
        shutil.copytree(tmp_path / "good", copy)
        flip(rng.choice(files_of(copy / "2")), rng)
        found = checkpoints_module.read(copy)
        assert found is not None
        expected = noise if found.step == 2 else tree()
        chex.assert_trees_all_equal(found.tree, jax.tree.map(np.asarray, expected))
        assert found.notes == {"cursor": found.step}
        assert bool(found.remarks) == (found.step == 1)
        told += found.step == 1
    assert told > 10


def damage_record(step: Path) -> None:
    shutil.rmtree(step / "record")


def damage_arrays(step: Path) -> None:
    for file in files_of(step / "arrays"):
        os.truncate(file, file.stat().st_size // 2)


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def damage_moment(step: Path) -> None:
    """JSON, but not the form in which Orbax has the moment of saving: it looks there before anything else."""
    (step / "_CHECKPOINT_METADATA").write_text("[]")
    damage_record(step)


@pytest.mark.slow
@pytest.mark.usefixtures("failed_reads")
@pytest.mark.parametrize("damage", [damage_record, damage_arrays, empty, damage_moment])
def test_of_a_damaged_checkpoint_the_one_before_is_taken_and_that_is_told(tmp_path: Path, damage) -> None:
    saved(tmp_path, (1, 2)).close()
    damage(tmp_path / "2")
    again = Checkpoints(tmp_path, identity=IDENTITY)
    restored, notes, remarks = again.restore(tree())
    chex.assert_trees_all_equal(restored, tree())
    assert notes == {"cursor": 1}
    (remark,) = remarks
    assert remark.startswith("the checkpoint of step 2 is damaged (")
    assert remark.endswith("the run goes on from the one of step 1, and makes the updates since then again")
    again.save(2, tree(), {"cursor": 22})  # the step can be saved once more
    again.close()
    assert Checkpoints(tmp_path, identity=IDENTITY).restore(tree()).notes == {"cursor": 22}
    assert (tmp_path / "damaged-2").is_dir()


def test_an_array_that_the_list_of_arrays_does_not_name_any_more_is_missed(tmp_path: Path) -> None:
    """Orbax reads what its list names: the rest would be left out without a word."""
    saved(tmp_path, (1, 2)).close()
    listed = tmp_path / "2" / "arrays" / "_METADATA"
    content = json.loads(listed.read_text())
    del content["tree_metadata"]["('weights',)"]
    listed.write_text(json.dumps(content))
    found = checkpoints_module.read(tmp_path)
    assert found is not None
    assert found.remarks == [
        "the checkpoint of step 2 is damaged (weights is missing, which was saved): this is the one of step 1"
    ]
    for only, step in (("weights", 1), ("count", 2)):
        found = checkpoints_module.read(tmp_path, only=(only,))
        assert found is not None
        assert (found.step, list(found.tree)) == (step, [only])


@pytest.mark.usefixtures("failed_reads")
def test_where_all_are_damaged_each_is_named(tmp_path: Path) -> None:
    saved(tmp_path, (1, 2)).close()
    damage_record(tmp_path / "1")
    damage_arrays(tmp_path / "2")
    with pytest.raises(DamagedFileError, match=r"every checkpoint in .* is damaged \(step 2: .*; step 1: .*anew"):
        Checkpoints(tmp_path, identity=IDENTITY).restore(tree())
    with pytest.raises(DamagedFileError, match=r"every checkpoint in .* is damaged"):
        checkpoints_module.read(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}, "nothing is moved where nothing can be used"


def test_checkpoints_that_are_discarded_are_gone(tmp_path: Path) -> None:
    kept = saved(tmp_path, (1, 2))
    kept.discard_from(2)
    assert kept.latest_step() == 1
    assert not (tmp_path / "2").exists()


@pytest.mark.usefixtures("failed_reads")
def test_a_damaged_checkpoint_is_set_aside_where_folders_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the lower layers of a container's file system."""
    saved(tmp_path, (1, 2)).close()
    damage_record(tmp_path / "2")
    again = Checkpoints(tmp_path, identity=IDENTITY)

    def across(*arguments: object, **options: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", across)
        assert again.restore(tree()).notes == {"cursor": 1}
    again.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "damaged-2"]
    assert files_of(tmp_path / "damaged-2")


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_files_are_made_as_the_mask_has_it(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with RunDir.create(configure(run_dir=str(tmp_path / "run"))).alone():
            saved(tmp_path / "run" / "checkpoints").close()
    finally:
        os.umask(before)
    wanted = 0o600 if mask == 0o077 else 0o660
    modes = {path.name: path.stat().st_mode & 0o666 for path in (tmp_path / "run").rglob("*")}
    assert {name: mode for name, mode in modes.items() if mode & ~0o004 != wanted or mode & mask} == {}


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write checkpoints to .*file/checkpoints \(Not a directory\): make room"):
        Checkpoints(tmp_path / "file" / "checkpoints", identity=IDENTITY)
    with pytest.raises(ArgumentError, match=r"no checkpoints can lie in '.*r\\udcff': Orbax needs a name in UTF-8"):
        Checkpoints(tmp_path / "r\udcff", identity=IDENTITY)
    with pytest.raises(ArgumentError, match=r"is longer than 3,800 bytes, which leaves no room for the names"):
        Checkpoints(tmp_path.joinpath(*["b" * 200] * 19), identity=IDENTITY)


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ((), "none was saved before; make room and resume"),
        (("5",), "the one of step 5 stays; make room and resume"),
        (None, "the folder is gone; put it back and resume"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_says_what_stays_and_what_to_do(
    left: tuple[str, ...] | None, told: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, identity=IDENTITY)
    for name in left or ():
        (folder / name).mkdir()
    if left is None:
        folder.rmdir()
    for raised, reason in (
        (ValueError("NOT_FOUND: Error in a: The disk is full [os_error_code='28']"), "The disk is full"),
        (FileNotFoundError(2, "No such file or directory", "a"), "No such file or directory"),
        (RuntimeError("No metadata: <object at 0x7>."), "No metadata: <object at 0x7>."),
        (RuntimeError(), "RuntimeError"),
    ):
        with pytest.raises(OSError, match=rf"cannot write a .* \({reason}\): {told}$"), checkpoints._writing():
            raise raised


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_names_in_an_encoding_that_is_not_orbaxs_are_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """In Latin-1 Orbax wrote to a folder of another name; in ASCII each checkpoint was told to be damaged."""
    (tmp_path / "ü").mkdir()
    monkeypatch.setattr("isgd_jax.app.checkpoints.os.fsencode", lambda name: str(name).encode(encoding))
    monkeypatch.setattr("isgd_jax.app.checkpoints.sys.getfilesystemencoding", lambda: encoding)
    for use in (checkpoints_module.read, lambda folder: Checkpoints(folder, identity=IDENTITY)):
        with pytest.raises(ArgumentError, match=r"Orbax needs a name in UTF-8; name another, or set PYTHONUTF8=1"):
            use(tmp_path / "ü")


def test_arrays_that_cannot_be_saved_are_named() -> None:
    one = jnp.ones(3)
    checkpoints_module.check_storable({"a": {"b": one}, "c.d": one})
    with pytest.raises(ArgumentError, match=r"\['e'\] is float32\[0, 3\], an array without numbers, which cannot be"):
        checkpoints_module.check_storable({"a": one, "e": jnp.zeros((0, 3))})
    with pytest.raises(ArgumentError, match=r"\['a'\]\['b'\] and \['a.b'\] would be one array in a checkpoint, a\.b"):
        checkpoints_module.check_storable({"a": {"b": one}, "a.b": one})
