from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

from isgd_jax.app.checkpoints import Checkpoints

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
    restored, notes = Checkpoints(tmp_path, identity=IDENTITY).restore(jax.tree.map(jnp.zeros_like, tree()))
    chex.assert_trees_all_equal(restored, tree())
    assert notes == {"cursor": 5}


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
    with pytest.raises(ValueError, match=r"of another model or optimiser: \['weights'\] is float32\[2, 3\] there"):
        Checkpoints(tmp_path, identity=IDENTITY).restore(tree() | {"weights": jnp.zeros((2, 4))})


def test_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*start it anew"):
        Checkpoints(tmp_path, identity=IDENTITY).restore(tree())


def test_what_a_kill_left_half_written_is_not_read(tmp_path: Path) -> None:
    saved(tmp_path, (1,)).close()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2.orbax-checkpoint-tmp" / "arrays").mkdir()
    assert Checkpoints(tmp_path, identity=IDENTITY).latest_step() == 1
