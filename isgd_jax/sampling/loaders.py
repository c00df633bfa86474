"""Draws for anyone's loader: index batches on the host, from the same samplers, for data and models of any library.

    sampler = isgd.importance_sampler(num_examples, batch_size=64)
    draws = isgd.loaders.index_sampler(sampler, key=jax.random.key(0), ahead=8)

    for batch in draws:                                  # or a torch DataLoader(..., batch_sampler=draws.lists())
        examples = [dataset[i] for i in batch.indices]
        ...                                              # an update with the mean of batch.weights * losses
        draws.observe(batch, norms=norms)                # anyone's numbers: norms, losses, rewards

A loader that fetches ahead asks for batches before it knows what the last ones taught. So the draw of step t is made
from what was observed of the steps up to t - ``ahead``, whenever that was: threads and their timing change nothing.

Guarantees:

* each estimate is unbiased, as that of the sampler is: a batch carries the weights it was drawn with;
* the batches depend on the key, the sampler and the observations alone, not on when or by which thread they are asked
  for;
* ``state_dict`` in the middle of an epoch, and ``load_state_dict``: the same batches come again bit for bit, those
  first that had been handed out and not observed;
* of several processes each gets its part of the same global draws, given the same key and observations;
* nothing but NumPy arrays goes in and out, and JAX's CPU does the work, whatever else the machine has.

Source: ours.
"""

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from isgd_jax.errors import ArgumentError, ArgumentTypeError, check_unmasked, check_whole
from isgd_jax.gradients.weights import draw_weights
from isgd_jax.sampling import score_table
from isgd_jax.sampling.state import BatchSampler, SamplerState, check_clock
from isgd_jax.types import Draw, Key

__all__ = ["IndexBatch", "IndexSampler", "index_sampler"]

FORMAT = 1
"""Of what ``state_dict`` gives."""

Gather = Callable[[np.ndarray], np.ndarray]

_ONE_PROCESS = (
    "copies in a loader's workers would all draw the same, and learn nothing of what is observed; draw where the "
    "updates are made, and give the loader batch_sampler=draws.lists(), whose workers get the indices"
)


class IndexBatch(NamedTuple):
    """What one step learns from; of several processes, this one's part."""

    step: int
    indices: np.ndarray
    """Of the examples, int64 [m]."""
    weights: np.ndarray
    """target / probs, float32 [m]: the update takes the mean of ``weights * losses``. Zero for padding."""
    probs: np.ndarray
    """That they were drawn with, float32 [m]."""


def index_sampler(
    sampler: BatchSampler,
    *,
    key: Key,
    ahead: int = 2,
    refresh_every: int = 100,
    shard: tuple[int, int] = (0, 1),
    gather: Gather | None = None,
    timeout: float = 60.0,
) -> "IndexSampler":
    """Index batches of a sampler, in time order.

    Args:
        sampler: any but ``presampling``, which needs the data.
        key: of the draws; the same in all processes.
        ahead: batches that may be asked for before the first of them is observed: those in a loader's queue, and the
            one that is learnt from; 1 or more.
        refresh_every: observations between two refreshes of the proposal.
        shard: this process's number, and how many there are; each gets an equal part of every batch.
        gather: ``part [k] -> whole [m]``, which puts the parts of all processes one after the other, such as
            ``partial(multihost_utils.process_allgather, tiled=True)``; needed where there are several processes.
        timeout: seconds that a thread waits for an observation before it is told that none comes.

    Returns:
        The sampler: an iterator that never ends.

    Raises:
        TypeError: a number is no whole number.
        ValueError: a number is out of range, or the parts are not equal.

    >>> import jax, numpy as np, isgd_jax as isgd
    >>> draws = index_sampler(isgd.importance_sampler(1000, batch_size=4), key=jax.random.key(0))
    >>> batch = next(draws)
    >>> batch.indices.shape, batch.weights.tolist()
    ((4,), [1.0, 1.0, 1.0, 1.0])
    >>> draws.observe(batch, norms=np.ones(4))
    """
    if sampler.candidates is not None:
        raise ArgumentError("presampling scores candidates inside the step, and needs the data: take another sampler")
    ahead = check_whole("ahead", ahead, least=1)
    refresh_every = check_whole("refresh_every", refresh_every, least=1)
    place, count = (check_whole("each number of shard", number, least=0) for number in shard)
    if not place < count or sampler.batch_size % count:
        raise ArgumentError(
            f"shard must be (number, count), with equal parts of a batch of {sampler.batch_size}; got {shard}"
        )
    if not (isinstance(timeout, Real) and timeout >= 0.0):
        raise ArgumentError(f"timeout must be 0 or more seconds, or infinity, got {timeout!r}")
    if count > 1 and gather is None:
        raise ArgumentError("of several processes each sees its own norms: gather= must bring them together")
    return IndexSampler(
        sampler, key, ahead=ahead, refresh_every=refresh_every, shard=(place, count), gather=gather, timeout=timeout
    )


class IndexSampler:
    """An iterator of `IndexBatch`; made by `index_sampler`. Call its methods from any thread of its process."""

    def __init__(
        self,
        sampler: BatchSampler,
        key: Key,
        *,
        ahead: int,
        refresh_every: int,
        shard: tuple[int, int],
        gather: Gather | None,
        timeout: float,
    ) -> None:
        self.sampler: BatchSampler = sampler
        self.ahead: int = ahead
        self._key, self._refresh_every, self._shard, self._gather, self._timeout = (
            key, refresh_every, shard, gather, timeout,
        )  # fmt: skip
        self._programs = _programs(sampler)
        self._device = jax.local_devices(backend="cpu")[0]
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._made: deque[Draw] = deque()
        """Draws not observed yet, the first of step ``observed``."""
        self._handed = self._observed = 0
        self._waiting: dict[int, tuple[Any, ...]] = {}
        """Observations of later steps that came before their turn."""
        self._listed: deque[IndexBatch] = deque()
        self._checked: set[tuple[bool, ...]] = set()
        """Which of norms, scores and seconds the sampler has been seen to take together."""
        with self._on_host():
            self._key = jax.device_put(key, self._device)
            self._state: SamplerState = jax.device_put(sampler.init(jax.random.fold_in(self._key, 2**31 - 1)))
            self._fill()

    def __iter__(self) -> "IndexSampler":
        return self

    def __next__(self) -> IndexBatch:
        """The next batch; waits where ``ahead`` batches are not observed yet.

        Raises:
            TimeoutError: none of them is observed in time.
            ValueError: this is another process than the one that made the sampler.
        """
        self._check_process()
        with self._changed:
            longest = min(self._timeout, threading.TIMEOUT_MAX)  # infinity is for ever
            if not self._changed.wait_for(lambda: self._handed < self._observed + self.ahead, longest):
                raise TimeoutError(self._stalled())
            draw, step = self._made[self._handed - self._observed], self._handed
            self._handed += 1
        return self._batch(draw, step)

    def lists(self) -> Iterator[list[int]]:
        """The same as lists of indices, as a loader's ``batch_sampler``; `listed` gives the batches in their order.

        A loop that leaves a loader leaves behind what is in its queue. `listed` would give those batches for the
        examples of others, so a loop over the lists may begin only where every batch that they gave was asked for:
        ``iter`` raises a ValueError otherwise. ``load_state_dict(state_dict())`` hands them out again.
        """
        return _Lists(self)

    def listed(self, indices: Any = None) -> IndexBatch:
        """The batch whose examples a loader that keeps the order has given next.

        Args:
            indices: of the examples as the loader gave them [m], where these carry their own: a batch that the loader
                lost, such as one whose reading failed, is then no batch of another's weights.

        Raises:
            ValueError: no list was taken that has not been asked for, or the next one is of other examples. Nothing is
                changed then.
        """
        if not self._listed:
            raise ArgumentError("every batch that lists() gave has been asked for")
        if indices is not None and not np.array_equal(np.asarray(indices), self._listed[0].indices):
            raise ArgumentError(
                f"the loader gave other examples than those of step {self._listed[0].step}, which are next: it lost a "
                "batch, or changed their order. load_state_dict(state_dict()) and a new loop over the loader hand out "
                "again what was not learnt from"
            )
        return self._listed.popleft()

    def observe(
        self, batch: IndexBatch, *, norms: Any = None, scores: Any = None, seconds: float | None = None
    ) -> None:
        """Move on by a step: what its examples' gradients measured, or anyone's numbers in their place.

        Later steps may be observed first; they wait for their turn.

        Args:
            batch: that was learnt from.
            norms: of its examples' gradients [m], this process's part; they teach all that the sampler learns.
            scores: what the table gets in place of the norms, [m]; alone they choose the draws, and teach no more.
            seconds: the caller's clock, where the sampler distrusts scores by it (``max_age_seconds``); from the start
                of the run, since float32 holds few digits.

        Raises:
            TypeError: they are masked, or no numbers.
            ValueError: there is not one number a draw, the step was observed before or never handed out, the batch is
                another sampler's, or ``seconds`` are wanted, or too large to tell ages by, or this is another process
                than the one that made the sampler. Nothing is changed then.
        """
        self._check_process()
        check_clock(seconds, self.sampler.max_age_seconds)
        given = (
            self._whole("norms", norms, batch), self._whole("scores", scores, batch),
            None if seconds is None else np.float32(seconds),
        )  # fmt: skip
        with self._changed, self._on_host():
            if not self._observed <= batch.step < self._handed or batch.step in self._waiting:
                raise ArgumentError(
                    f"step {batch.step} was observed before, or never handed out: {self._observed} steps are observed, "
                    f"{self._handed} are handed out"
                )
            draw = self._made[batch.step - self._observed]
            known = ((batch.indices, draw.indices), (batch.probs, draw.probs))  # the caller may have written into one
            if not any(np.array_equal(theirs, np.asarray(own)[self._mine]) for theirs, own in known):
                raise ArgumentError(
                    f"the batch is not that of step {batch.step} of this sampler: observe the batches that it hands out"
                )
            self._check(draw, given)
            self._waiting[batch.step] = given
            while self._observed in self._waiting:
                found = self._waiting.pop(self._observed)
                self._state = self._programs.observe(self._state, self._made.popleft(), *found)
                self._observed += 1
                self._fill()
            self._changed.notify_all()

    def record(self, ids: Any, scores: Any, *, version: int | None = None, seconds: float | None = None) -> None:
        """Write scores that were measured besides; the next refresh knows them.

        Args:
            ids: of examples [c].
            scores: as many numbers, 0 or more; those that are not are set aside.
            version: updates that the parameters had seen when they were measured, of this sampler's steps; by default
                all that are observed so far, and at most ``ahead`` steps more.
            seconds: as for ``observe``: counted from the start of the run.

        Raises:
            TypeError: ids or the version are no whole numbers, or an array is masked.
            ValueError: there is not one score an id, the version is of updates that nobody can have made yet, or
                ``seconds`` are wanted, or too large to tell ages by, or this is another process than the one that made
                the sampler. Nothing is changed then.
        """
        self._check_process()
        check_clock(seconds, self.sampler.max_age_seconds)
        check_unmasked("ids", ids)
        check_unmasked("scores", scores)
        if version is not None:
            check_whole("version", version, least=0)
        ids, scores = np.asarray(score_table.as_ids(ids, self.sampler.num_examples)), np.asarray(scores, np.float32)
        if ids.ndim != 1 or ids.shape != scores.shape:
            raise ArgumentError(
                f"expected one score for each of the ids [c], got shapes {scores.shape} and {ids.shape}"
            )
        with self._changed, self._on_host():
            most = (self._observed + self.ahead) // self.sampler.steps_per_update
            if version is not None and version > most:
                raise ArgumentError(
                    f"version must be of updates that are made: at most {most}, since {self._observed} steps are "
                    f"observed and {self.ahead} more can be learnt from; got {version}. Count from this sampler's "
                    "first step"
                )
            at = None if version is None else jnp.int32(version)
            now = None if seconds is None else np.float32(seconds)
            self._state = self._programs.record(self._state, ids, scores, at, now)

    def report(self) -> Any:
        """What the sampler knows of the variance (`isgd_jax.importance_sampler`); print it."""
        with self._changed, self._on_host():
            return self.sampler.report(self._state)

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on, as numbers and NumPy arrays; a loader can pickle it, Orbax save it.

        The key is in it; ``refresh_every`` and ``gather`` are for the caller to give again.
        """
        with self._changed:
            return {
                "format": FORMAT,
                "key": np.array(_data(self._key)),
                "observed": self._observed,
                "state": [np.array(x) for x in jax.tree.leaves(self._state)],
                "draws": [[np.array(x) for x in jax.tree.leaves(draw)] for draw in self._made],
            }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there: the next batch is the first that was not observed.

        Batches that had been handed out and not observed are handed out again; observations that waited for their turn
        are forgotten, and so is what `lists` gave.

        Args:
            saved: by `state_dict`, of a sampler made with the same arguments.

        Raises:
            ValueError: it was saved by another format, sampler or ``ahead``. Nothing is changed then.
        """
        if saved.get("format") != FORMAT:
            raise ArgumentError(f"expected a state of format {FORMAT}, got {saved.get('format')!r}")
        if len(saved["draws"]) != self.ahead:
            raise ArgumentError(f"it was saved with ahead={len(saved['draws'])}, here it is {self.ahead}")
        with self._changed, self._on_host():
            [key_data] = _like([_data(self._key)], [saved["key"]])
            state = _like(self._state, saved["state"])
            draws = [_like(draw, leaves) for draw, leaves in zip(self._made, saved["draws"], strict=True)]
            observed = int(saved["observed"])
            self._key, self._state, self._made = _key_of(key_data, self._key), state, deque(draws)
            self._observed = self._handed = observed
            self._waiting.clear()
            self._listed.clear()
            self._changed.notify_all()

    def __reduce__(self) -> Any:
        raise ArgumentTypeError(f"an index_sampler cannot be pickled: {_ONE_PROCESS}; state_dict() can be saved")

    def _check_process(self) -> None:
        if os.getpid() != self._process:  # a fork; the lock may be held for ever there
            raise ArgumentError(f"this index_sampler was made in another process: {_ONE_PROCESS}")

    def _stalled(self) -> str:
        """Why no batch can be handed out."""
        if self._waiting:
            return (
                f"step {self._observed} was handed out and not observed in {self._timeout:g} s, and "
                f"{len(self._waiting)} later ones wait for it: observe each batch, also one whose update fails; or, "
                "where a loop was left in the middle of a step, load_state_dict(state_dict()) hands its batch out again"
            )
        return (
            f"{self.ahead} batches are handed out and none was observed in {self._timeout:g} s: call observe() after "
            "each update, or ask for fewer (ahead= must be the loader's queue and one more)"
        )

    def _fill(self) -> None:
        """Refresh if it is due, and draw the steps that may be asked for now."""
        if self._observed % self._refresh_every == 0:
            self._state = self._programs.refresh(self._state)
        while len(self._made) < self.ahead:
            self._made.append(self._programs.draw(self._key, self._state, jnp.int32(len(self._made))))

    def _batch(self, draw: Draw, step: int) -> IndexBatch:
        with self._on_host():
            weights = _weights(draw.probs, draw.mask, draw.target)
        mine = self._mine
        indices, weights, probs = (np.array(x)[mine] for x in (draw.indices, weights, draw.probs))  # the caller's own
        return IndexBatch(step, indices.astype(np.int64), weights, probs)

    @property
    def _mine(self) -> slice:
        place, count = self._shard
        part = self.sampler.batch_size // count
        return slice(place * part, (place + 1) * part)

    def _check(self, draw: Draw, given: tuple[Any, ...]) -> None:
        """Whether the sampler takes what is given: told at once, and not when the turn of the step comes."""
        kind = tuple(x is not None for x in given)
        if kind not in self._checked:
            jax.eval_shape(self._programs.observe, self._state, draw, *given)
            self._checked.add(kind)

    def _whole(self, what: str, given: Any, batch: IndexBatch) -> np.ndarray | None:
        if given is None:
            return None
        check_unmasked(what, given)
        numbers = np.asarray(given, np.float32)
        if numbers.shape != batch.indices.shape:
            raise ArgumentError(f"expected {what} of the {len(batch.indices)} draws, got shape {numbers.shape}")
        whole = numbers if self._gather is None else np.asarray(self._gather(numbers), np.float32)
        if whole.shape != (self.sampler.batch_size,):
            raise ArgumentError(
                f"gather must put the parts one after the other, {what} [{self.sampler.batch_size}]; got shape "
                f"{whole.shape}"
            )
        return whole

    def _on_host(self) -> Any:
        return jax.default_device(self._device)


class _Lists(Iterator[list[int]]):
    """What `IndexSampler.lists` gives; no generator, which would be at its end after an error."""

    def __init__(self, draws: IndexSampler) -> None:
        self._draws = draws

    def __iter__(self) -> "_Lists":
        if left := len(self._draws._listed):
            raise ArgumentError(
                f"a loop begins while {left} batches that lists() gave were not asked for by listed(), such as those "
                "in the queue of a loader that was left: call load_state_dict(state_dict()) before, and they are "
                "handed out again"
            )
        return self

    def __next__(self) -> list[int]:
        batch = next(self._draws)
        self._draws._listed.append(batch)
        return batch.indices.tolist()


class _Programs(NamedTuple):
    """The functions of a sampler, compiled; all but ``draw`` donate the state."""

    draw: Callable[..., Draw]
    observe: Callable[..., SamplerState]
    record: Callable[..., SamplerState]
    refresh: Callable[..., SamplerState]


_weights = jax.jit(draw_weights)


@functools.lru_cache(maxsize=8)
def _programs(sampler: BatchSampler) -> _Programs:
    def draw(key: Key, state: SamplerState, ahead: Any) -> Draw:
        return sampler.sample(key, state, ahead=ahead)

    def observe(state: SamplerState, draw: Draw, norms: Any, scores: Any, seconds: Any) -> SamplerState:
        return sampler.observe(state, draw, norms=norms, scores=scores, seconds=seconds)

    def record(state: SamplerState, ids: Any, scores: Any, at: Any, seconds: Any) -> SamplerState:
        return sampler.record(state, ids, scores, version=state.version if at is None else at, seconds=seconds)

    changing = (jax.jit(function, donate_argnums=0) for function in (observe, record, sampler.refresh))
    return _Programs(jax.jit(draw), *changing)


def _data(key: Key) -> Any:
    """The raw data of a key, new-style or old."""
    return jax.random.key_data(key) if _is_typed(key) else key


def _key_of(data: Any, like: Key) -> Key:
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like)) if _is_typed(like) else data


def _is_typed(key: Key) -> bool:
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _like(tree: Any, leaves: list[np.ndarray]) -> Any:
    """A tree of these leaves, if they are of its shapes and dtypes."""
    known, structure = jax.tree.flatten(tree)
    types = [(x.shape, np.dtype(x.dtype)) for x in known]
    if types != [(np.shape(x), np.asarray(x).dtype) for x in leaves]:
        raise ArgumentError("it was saved of another sampler: of other options, batch size or number of examples")
    return jax.tree.unflatten(structure, [jnp.array(x) for x in leaves])
