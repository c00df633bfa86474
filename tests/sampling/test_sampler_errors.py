"""Every refusal, in the names of the arguments: what was expected, what came, what to do."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_problem import unchecked

import isgd_jax as isgd
from isgd_jax.sampling.state import FORMAT
from isgd_jax.types import Draw

N, M = 8, 4


def _importance(**options: Any) -> Any:
    return isgd.importance_sampler(N, **{"batch_size": M, **options})


def _fixed(**options: Any) -> Any:
    return isgd.fixed(np.ones(N), **{"batch_size": M, **options})


def _epochs(**options: Any) -> Any:
    return isgd.shuffled_epochs(N, **{"batch_size": M, **options})


def _uniform(**options: Any) -> Any:
    return isgd.uniform_draws(N, **{"batch_size": M, **options})


def _presampling(**options: Any) -> Any:
    return isgd.presampling(N, **{"batch_size": M, **options})


EACH = (_importance, _fixed, _epochs, _uniform, _presampling)
SHORT = np.ones(N - 1, np.float32)
BROKEN = np.r_[np.ones(N - 1), np.nan].astype(np.float32)

REFUSED: list[tuple[tuple[Callable[..., Any], ...], dict[str, Any], type[Exception], str]] = [
    (EACH, {"batch_size": 0}, ValueError, r"batch_size must be 1 or more, got 0"),
    (EACH, {"batch_size": True}, TypeError, "batch_size must be a whole number, got True"),
    (EACH, {"steps_per_update": 0}, ValueError, "steps_per_update must be 1 or more, got 0"),
    (EACH, {"steps_per_update": True}, TypeError, "steps_per_update must be a whole number, got True"),
    (EACH, {"example_weights": SHORT}, ValueError, r"example_weights must have shape \(8,\), got \(7,\)"),
    (EACH, {"example_weights": BROKEN}, ValueError, "example_weights must be finite, got nan at 7"),
    ((_epochs,), {"batch_size": N + 1}, ValueError, "an epoch of 8 examples has no batch of 9"),
    ((_importance,), {"order_every": 0}, ValueError, "order_every must be 1 or more, got 0"),
    ((_importance,), {"max_age": -1}, ValueError, "max_age must be 0 or more, got -1"),
    ((_importance,), {"learning_steps": -1}, ValueError, "learning_steps must be 0 or more, got -1"),
    ((_importance,), {"max_age_seconds": 0.0}, ValueError, "max_age_seconds must be above 0, got 0.0"),
    ((_importance,), {"min_trusted": 1.5}, ValueError, "min_trusted is a share, 0 to 1, got 1.5"),
    ((_importance,), {"score_memory": 1.0}, ValueError, "score_memory .* 0 to below 1, got 1.0"),
    ((_importance, _fixed), {"additive": -1.0}, ValueError, "additive must be 0 or more, got -1.0"),
    ((_importance, _fixed), {"additive": float("nan")}, ValueError, "additive must be 0 or more, got nan"),
    (
        (_importance, _fixed, _presampling),
        {"uniform_fraction": 0.0},
        ValueError,
        "uniform_fraction .* got 0.0: an exam",
    ),
    ((_importance, _fixed, _presampling), {"uniform_fraction": 1.5}, ValueError, "uniform_fraction must be .* got 1.5"),
    ((_importance, _fixed), {"order": SHORT}, ValueError, r"order needs one number an example, \[8\]; got .*\(7,\)"),
    ((_presampling,), {"candidates": 0}, ValueError, "candidates must be 1 or more, got 0"),
    ((_presampling,), {"score_cost": -1.0}, ValueError, "score_cost must be 0 or more forward passes, got -1.0"),
    *(
        (
            (_importance, _fixed),
            {"sampler": name, "batch_size": N + 1},
            ValueError,
            "draws distinct examples: batch_siz",
        )
        for name in ("without_replacement", "poisson")
    ),
    (
        (_importance, _fixed),
        {"sampler": "poisson", "batch_size": 7},
        ValueError,
        "expects 0.56 draws .* give it 8",
    ),
]


@pytest.mark.parametrize(("makers", "options", "error", "words"), REFUSED)
def test_constructors_refuse_in_the_names_of_their_arguments(
    makers: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    for make in makers:
        with pytest.raises(error, match=words):
            make(**options)


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (_importance, {"sampler": "random"}, ValueError, "sampler must be one of stratified, .*; got 'random'"),
        (_importance, {"order": "loss"}, ValueError, 'order must be "score", "index", an array .*; got \'loss\''),
        (_importance, {"uniform_fraction": "best"}, ValueError, "uniform_fraction must be .* got 'best'"),
        (_importance, {"max_age": 2.5}, TypeError, "max_age must be a whole number, got 2.5"),
        (_importance, {"order_every": "2"}, TypeError, "order_every must be a whole number, got '2'"),
        (
            _fixed,
            {"uniform_fraction": "auto"},
            TypeError,
            "uniform_fraction must be a number here.*only importance_sam",
        ),
        (
            _presampling,
            {"uniform_fraction": "auto"},
            TypeError,
            "uniform_fraction must be a number here, .* got 'auto'",
        ),
        (_presampling, {"candidates": 2.0}, TypeError, "candidates must be a whole number, got 2.0"),
        (_epochs, {"batch_size": 4.0}, TypeError, "batch_size must be a whole number, got 4.0"),
    ],
)
def test_what_types_would_have_told_is_told_without_them_too(
    make: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    """Tests check the types of arguments by a hook, which users do not have."""
    with unchecked(), pytest.raises(error, match=words):
        make(**options)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (np.ones((N, 2)), r"got shape \(8, 2\)$"),
        (np.array([1.0, np.nan]), "the first wrong one is at 1"),
        (np.array([1.0, 2.0, np.inf]), "the first wrong one is at 2"),
        (np.array([-1.0, 2.0]), "the first wrong one is at 0"),
        (np.array([1.0, 1e300]), "finite as float32.*the first wrong one is at 1"),
    ],
)
def test_fixed_refuses_what_are_no_scores(scores: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        isgd.fixed(scores, batch_size=1)


def test_masked_arrays_are_refused_by_name() -> None:
    """NumPy and JAX drop the mask, and what it hid would count."""
    masked = np.ma.masked_array(np.ones(4, np.float32), mask=[0, 1, 0, 0])
    for name, make in {
        "scores": lambda: isgd.fixed(masked, batch_size=2),
        "example_weights": lambda: isgd.importance_sampler(4, batch_size=2, example_weights=masked),
        "order": lambda: isgd.importance_sampler(4, batch_size=2, order=masked),
    }.items():
        with pytest.raises(TypeError, match=rf"{name} must be an array without a mask: say what to put, .filled"):
            make()
    with pytest.raises(TypeError, match="example_weights must be an array without a mask"):
        isgd.importance_weighting(4, example_weights=masked)


def test_a_state_of_another_format_or_data_set_is_refused_by_name() -> None:
    for make in (_importance, _epochs):
        sampler, other = make(), isgd.importance_sampler(N + 1, batch_size=M)
        state = sampler.init()
        key, strange = jax.random.key(0), state._replace(format=jnp.int32(FORMAT + 1))
        draw = Draw(jnp.arange(M), jnp.full(M, 1.0 / N), jnp.ones(M, bool))
        for call in (sampler.refresh, sampler.report, lambda state, s=sampler, d=draw: s.observe(state, d)):
            with pytest.raises(
                ValueError,
                match=f"format {FORMAT + 1}, this version of isgd_jax reads format {FORMAT}: begin with init",
            ):
                call(strange)
            with pytest.raises(ValueError, match="the state is of 9 examples, this sampler of 8"):
                call(other.init())
        with pytest.raises(ValueError, match="the state is of 8 examples, this sampler of 9"):
            jax.jit(other.sample)(key, state)


def test_gradients_that_do_not_fit_the_draw_are_refused() -> None:
    sampler = _importance()
    state = sampler.init()
    draw = sampler.sample(jax.random.key(0), state)
    wrong = jnp.ones(M + 1)
    for given, what in (({"norms": wrong}, "norms"), ({"scores": wrong}, "scores"), ({"grads": {"w": wrong}}, "norms")):
        with pytest.raises(ValueError, match=rf"expected {what} of the 4 draws, got shape \(5,\): pass the draw that"):
            sampler.observe(state, draw, **given)


def test_a_draw_of_a_bare_sampler_is_refused() -> None:
    sampler = _importance()
    state = sampler.init()
    bare = isgd.samplers.stratified(jax.random.key(0), jnp.full(N, 1.0 / N), num_draws=M)
    with pytest.raises(
        TypeError, match=r"needs a draw that sample\(\) of the same sampler made; this one has no target"
    ):
        sampler.observe(state, bare, norms=jnp.ones(M))


def test_record_refuses_what_does_not_fit() -> None:
    sampler = _importance()
    state, ids, ones = sampler.init(), np.arange(3), np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"one score for each of the ids \[c\], got shapes \(1,\) and \(3,\)"):
        sampler.record(state, ids, ones[:1], version=0)
    with pytest.raises(ValueError, match="sketches came, but the order of this sampler is not made of any"):
        sampler.record(state, ids, ones, version=0, sketches=np.ones((3, 2), np.float32))

    class Sketch:
        dims = 2

        def of_grads(self, grads: Any, /) -> jax.Array:
            return grads

    sketched = _importance(order=Sketch())
    with pytest.raises(ValueError, match=r"expected sketches of shape \(3, 2\).*got \(2, 2\)"):
        sketched.record(sketched.init(), ids, ones, version=0, sketches=np.ones((2, 2), np.float32))


def test_versions_that_are_no_count_are_refused() -> None:
    """1.5 was cut to 1, and the scores of version -1 were those of examples that nobody has scored."""
    sampler = _importance()
    state, ids, ones = sampler.init(), np.arange(3), np.ones(3, np.float32)
    wrong = {"half": (1.5, TypeError), "true": (True, TypeError), "word": ("1", TypeError), "below": (-1, ValueError)}
    for version, error in [*wrong.values(), (jnp.float32(1.0), TypeError), (2**40, ValueError)]:
        with unchecked(), pytest.raises(error, match="version must be"):
            sampler.record(state, ids, ones, version=version)


def test_a_clock_that_is_no_number_is_refused() -> None:
    """Scores of an infinite reading were believed for ever, those of NaN never, and NaN stood in the state."""
    sampler = _importance(max_age_seconds=5.0)
    state, ids, ones = sampler.init(), np.arange(3), np.ones(3, np.float32)
    for seconds in (float("nan"), float("inf"), jnp.float32("-inf")):
        with pytest.raises(ValueError, match="seconds must be finite, counted from the start of the run, got"):
            sampler.record(state, ids, ones, version=0, seconds=seconds)
    with pytest.raises(ValueError, match=r"float32 can tell ages of max_age_seconds=5, got 1e\+300"):
        sampler.record(state, ids, ones, version=0, seconds=1e300)


def test_the_target_and_weights_of_the_transform_are_an_error_together() -> None:
    weights = jnp.ones(N)
    sampler, tx = _importance(example_weights=weights), isgd.importance_weighting(N, weights)
    draw, own = sampler.sample(jax.random.key(0), sampler.init()), {"w": jnp.zeros(2)}
    grads = {"w": jnp.ones((M, 2))}
    with pytest.raises(ValueError, match="given twice, as target= and as importance_weighting"):
        tx.update(grads, tx.init(own), own, probs=draw.probs, target=draw.target)
    plain = isgd.importance_weighting(N)
    with unchecked(), pytest.raises(ValueError, match=r"target must have one number a draw, \(4,\); got \(3,\)"):
        plain.update(grads, plain.init(own), own, probs=draw.probs, target=jnp.ones(3))


@pytest.mark.parametrize("make", [_importance, _epochs, _presampling], ids=["importance", "epochs", "presampling"])
def test_steps_ahead_that_are_no_count_are_refused(make: Callable[..., Any]) -> None:
    sampler = make()
    draw = sampler.candidates or sampler.sample
    for ahead, error in ((-1, ValueError), (np.int64(-1), ValueError), (1.5, TypeError), (True, TypeError)):
        with unchecked(), pytest.raises(error, match="ahead"):
            draw(jax.random.key(0), sampler.init(), ahead=ahead)


def test_numbers_of_numpy_become_those_of_python() -> None:  # whose products wrap, and whose types go into the state
    for make in EACH:
        with unchecked():
            made = make(batch_size=np.uint8(M), steps_per_update=np.int64(2))
        assert [type(x) for x in (made.num_examples, made.batch_size, made.steps_per_update)] == [int] * 3
    with unchecked():
        many = isgd.presampling(300, batch_size=np.uint8(64), candidates=np.uint8(4))
    state = jax.eval_shape(many.init)
    assert many.candidates is not None
    assert jax.eval_shape(many.candidates, jax.random.key(0), state).indices.shape == (256,)
