"""Guarantees of packed states: the same bits, and steps that compute the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax.training.packing import LARGEST, Held, Packing

State = dict[str, Any]


def state() -> State:
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38], np.float32)
    odd[0] = np.array([0x7FC0_1234], np.uint32).view(np.float32)[0]  # a NaN with a message
    return {
        "empty": jnp.zeros((0, 3)),
        "flags": jnp.array([[True, False], [False, True]]),
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "key": jax.random.key(7),
        "nothing": None,
        "odd": jnp.asarray(odd),
        "seed": jnp.array([0xFFFF_FFFF, 5], jnp.uint32),
        "step": jnp.int32(-3),
        "table": jnp.arange(LARGEST + 1, dtype=jnp.float32),
    }


def bits(tree: Any) -> list[bytes]:
    raw = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree))
    return [np.asarray(x).tobytes() for x in raw]


def step(state: State, by: jax.Array) -> tuple[State, jax.Array]:
    return state | {"step": state["step"] + by, "table": state["table"] * 2.0, "flags": ~state["flags"]}, state["odd"]


def test_what_is_unpacked_is_what_was_packed_bit_for_bit() -> None:
    first = state()
    packing = Packing(first)
    packed = packing.pack(first)
    words, *others = packed.moving
    assert (words.shape, words.dtype) == ((4 + 6 + 2 + 1,), jnp.int32)
    assert [x.dtype.name for x in others] == ["float32", "bfloat16", "key<fry>", "float32"]
    again = packing.unpack(packed)
    assert jax.tree.structure(again) == jax.tree.structure(first)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(again)] == [(x.shape, x.dtype) for x in jax.tree.leaves(first)]
    assert bits(again) == bits(first)
    assert again["table"] is others[-1] is first["table"]
    assert bits(Packing({}).unpack(Packing({}).pack({}))) == []
    with pytest.raises(AssertionError, match="packed for"):
        packing.pack(first | {"nothing": jnp.ones(())})


def test_packed_steps_do_what_whole_ones_do_and_whoever_looks_or_sets_sees_the_state() -> None:
    packing = Packing(state())
    packed_step, by = packing.step(step), jnp.int32(2)
    held, whole = Held(state(), packing), Held(state())
    for _ in range(3):
        results = held.advance(packed_step, by), whole.advance(step, by)
        assert bits(results[0]) == bits(results[1])
    apart = held.copy()
    apart.advance(packed_step, by)
    seen = held.state
    assert bits(seen) == bits(whole.state)
    assert held.state is seen
    held.state = seen | {"step": jnp.int32(40)}
    held.advance(packed_step, by)
    assert int(held.state["step"]) == 42
    assert packed_step._cache_size() == 1
    assert seen["table"].is_deleted()  # donated


def test_a_step_that_leaves_what_stands_is_not_given_it() -> None:
    """It computes what the step of the whole state does; who touches what stands fails while it is traced."""

    def some(state: State, by: jax.Array) -> tuple[State, jax.Array]:
        return state | {"step": state["step"] + by, "half": state["half"] * 2.0}, by

    packing, by = Packing(state(), lambda state: (state["step"], state["half"])), jnp.int32(2)
    held, whole, seen = Held(state(), packing), Held(state()), state()
    of_all, of_some = packing.step(step), packing.moving_step(some)
    assert [x.shape for x in packing.pack(seen).moving] == [(1,), (3,)]
    for packed_step, whole_step in [(of_some, some), (of_all, step), (of_some, some)]:
        held.advance(packed_step, by), whole.advance(whole_step, by)
    assert bits(held.state) == bits(whole.state)
    held.state = seen
    held.advance(of_some, by)
    assert (seen["half"].is_deleted(), seen["table"].is_deleted()) == (True, False)
    assert held.state["table"] is seen["table"]
    assert (of_some._cache_size(), of_all._cache_size()) == (1, 1)
    with pytest.raises((TypeError, AttributeError)):
        Held(state(), packing).advance(packing.moving_step(step), by)
