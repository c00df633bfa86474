"""Fine-tuning a small language model: which way to choose batches has the least perplexity, in equal seconds?

Question   The work of today in small: a transformer, trained before on other text, fine-tuned with AdamW on sequences
           of different lengths. Does importance sampling that knows the lengths (``costs=``) learn more in the same
           seconds than what is usually done about them?

Data       Functions of Python's own library, cut at 256 tokens, split by whole packages (`equal_seconds/code.py`):
           pre-trained on one half of the packages, fine-tuned on 400 sequences of others, validation and test of yet
           others. Vocabulary of 1,024, NNX transformer of width 64, four heads, two blocks (`benchmarks/lengths.py`).
           All learn the mean over tokens. Fine-tuning seeds share the pre-trained model.

Arms       uniform    epoch-shuffled sequences, computed in chunks of one padded length
           packing    epochs packed first fit into rows of 256 tokens, as many tokens a batch, each apart
           buckets    batches of one padded length each, as many tokens a batch, shuffled
           ranks      Loshchilov & Hutter 2015 (arXiv 1511.06343): by ranks of the latest losses, 100 : 1 down to 1 : 1
           ours       importance sampling with ``costs=``, all else at its defaults; nothing scored but what is drawn

Told       Perplexity of a token of the test packages; of the sequences that were learnt from; passes over these.

Protocol   `equal_seconds/race.py`; a batch is counted in sequences of the average length.

Commands   python experiments/language.py                   two hours on one core, eight where the grid is extended
           python experiments/language.py --extensions 0    the two hours
           python experiments/language.py --quick           minutes
It goes on where it was stopped.

Result     --extensions 0, five seeds, one core while the other was at work. **A tie by price and a loss by the clock**,
           by 0.2 to 0.4 % of the perplexity: uniform batches do best, then ours, packing, buckets and ranks. Test
           perplexity, 12.31 before; median (least to largest), and less uniform's [95 %]:

               arm       steps  60 s by price                                      60 s by the clock         passes
               uniform   211    11.512 (11.506 to 11.518)                          11.526                    34
               ours      198    11.545 (11.507 to 11.547)  +0.024 [-0.001, +0.050]  +0.043 [+0.022, +0.064]  36
               packing   171    11.566 (11.563 to 11.574)  +0.055 [+0.049, +0.060]  +0.056 [+0.050, +0.061]  27
               buckets   440    11.598 (11.595 to 11.607)  +0.087 [+0.084, +0.089]  +0.069 [+0.060, +0.078]  16
               ranks     278    11.653 (11.631 to 11.691)  +0.149 [+0.115, +0.183]  +0.144 [+0.107, +0.180]  14

           Uniform, packing and ours chose batches of 64 and all of the seconds; buckets and ranks batches of 16 and
           half of them: they fit the 400 sequences sooner, and overfit. All chose the rate 0.0003. Batches and rates
           lie on edges of the grid, which was not extended (as far as batches of 8 were tried, with a quarter of the
           seconds, they were better in validation for no arm). Draws of ours were independent from step to step. On 400
           sequences it is not the noise of the gradient that holds fine-tuning back.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmarks.lengths import BLOCKS, HEADS, VOCABULARY, WIDTH, Transformer
from equal_seconds import code, race
from flax import nnx

import isgd_jax as isgd

__all__ = ["ARMS", "MEASURES", "Bench", "Pieces", "main", "perplexity", "pretrained", "token_losses"]

Tree = Any
Array = jax.Array
CHUNK, EVAL_CHUNK = 256, 1024
"""Tokens that a program computes at once."""
SIZES = {"train": 400, "valid": 150, "test": 300}
PRETRAINING = {"steps": 150, "rows": 16, "rate": 3e-3, "seed": 0}
DECAY = 0.01
PRESSURE = 100.0
REFRESH_EVERY = 25
FULL = race.Plan(race.Grid((3e-4, 1e-3, 3e-3), (16, 64), (0.5, 1.0)), seconds=60.0, seeds=5)
QUICK = race.Plan(race.Grid((3e-4, 1e-3, 3e-3), (16,), (1.0,)), seconds=4.0, seeds=3)
MEASURES = (
    race.Measure("test", "test perplexity", False),
    race.Measure("train", "train perplexity", False),
    race.Measure("passes", "passes", True, 1),
)


@functools.cache
def graph() -> Any:
    """Of the model."""
    return nnx.split(Transformer(nnx.Rngs(0)), nnx.Param)[0]


def token_losses(params: Tree, row: Any) -> Array:
    """The cross-entropy of each token of ONE row [length], 0 on padding; sequences of a row see only themselves."""
    model = nnx.merge(graph(), params)
    before = jnp.where(row.places == 0, 0, jnp.pad(row.tokens[:-1], (1, 0)))
    x = model.embed(before) + model.place(row.places)
    mask = nnx.make_causal_mask(row.tokens, dtype=bool) & (row.segments[:, None] == row.segments[None, :])[None]
    for block in model.blocks:
        x = block(x, mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(model.out(model.norm(x)), row.tokens)
    return jnp.where(row.segments > 0, losses, 0.0)


class Row(NamedTuple):
    """What the model reads of a chunk."""

    tokens: Array
    segments: Array
    places: Array


def rows_of(chunk: code.Chunk) -> Row:
    """All but who is in it."""
    return Row(chunk.tokens, chunk.segments, chunk.places)


def loss_fn(params: Tree, row: Row) -> Array:
    """The sum over the tokens of a row."""
    return jnp.sum(token_losses(params, row))


@jax.jit
def sums(params: Tree, rows: Row) -> Array:
    """The losses of rows [rows]."""
    return jax.vmap(loss_fn, (None, 0))(params, rows)


@jax.jit
def plain(params: Tree, rows: Row, weights: Array) -> tuple[Array, None, Tree]:
    """Losses of rows, and the sum of weight times gradient, at its ordinary price."""

    def total(params: Tree) -> tuple[Array, Array]:
        losses = jax.vmap(loss_fn, (None, 0))(params, rows)
        return jnp.sum(weights * losses), losses

    gradient, losses = jax.grad(total, has_aux=True)(params)
    return losses, None, gradient


@jax.jit
def scored(params: Tree, rows: Row, weights: Array) -> tuple[Array, Array, Tree]:
    """The same with the norms of the gradients of rows [rows]."""
    losses, grads = isgd.per_example_value_and_grad(loss_fn)(params, rows)
    return losses, isgd.norms(grads), isgd.weighted_mean(grads, weights * len(weights))


TX = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(DECAY))
add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))


@jax.jit
def update(params: Tree, opt_state: Tree, gradient: Tree, rate: Array) -> tuple[Tree, Tree]:
    """AdamW."""
    updates, opt_state = TX.update(gradient, opt_state, params)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), opt_state


def perplexity(params: Tree, text: code.Text) -> float:
    """Of a token, all tokens alike; infinite where the model diverged."""
    parts = [sums(params, rows_of(c)) for c in code.chunks(text, np.arange(len(text.lengths)), EVAL_CHUNK)]
    mean = sum(float(jnp.sum(part)) for part in parts) / int(text.lengths.sum())
    return math.exp(mean) if mean < 700 else math.inf


class Batch(NamedTuple):
    """Chunks, the weights of their rows' summed losses, and the sequences in the order of the draw, where it is one."""

    chunks: list[code.Chunk]
    weights: list[np.ndarray]
    indices: np.ndarray | None = None
    draw: isgd.Draw | None = None


def mean_over_tokens(chunks: list[code.Chunk], **more: Any) -> Batch:
    """Each token of the batch alike."""
    count = sum(int(np.count_nonzero(chunk.segments)) for chunk in chunks)
    return Batch(chunks, [np.full(len(chunk.tokens), 1.0 / count, np.float32) for chunk in chunks], **more)


def by_member(batch: Batch, parts: list[Any]) -> np.ndarray:
    """What chunks gave by row, in the order of the draw [m]."""
    found = np.zeros(sum(len(chunk.members) for chunk in batch.chunks), np.float32)
    for chunk, part in zip(batch.chunks, parts, strict=True):
        found[chunk.members] = np.asarray(part)[: len(chunk.members)]
    return found


class Pieces:
    """Gives out an epoch piece by piece, and makes the next when it is over."""

    def __init__(self, make: Callable[[], list[Any]]) -> None:
        self.make, self.left = make, []

    def next(self) -> Any:
        """The next piece."""
        if not self.left:
            self.left = self.make()[::-1]
        return self.left.pop()


class Uniform:
    """Epoch-shuffled sequences; what does not fill a batch is left out of its epoch."""

    program = staticmethod(plain)

    def __init__(self, text: code.Text, batch: int, seed: int) -> None:
        self.text, self.batch, self.rng = text, batch, np.random.default_rng(seed)
        self.tokens, self.learnt = batch * float(text.costs.mean()), 0
        self.pieces = Pieces(self.epoch)

    def epoch(self) -> list[Any]:
        """The batches of an epoch, as far as they can be made before."""
        order = self.rng.permutation(len(self.text.lengths))
        return [order[at : at + self.batch] for at in range(0, len(order) - self.batch + 1, self.batch)]

    def choose(self, step: int, progress: float) -> Batch:
        """The batch of a step.

        Args:
            step: from 0 on.
            progress: the share of the budget that is spent.
        """
        return mean_over_tokens(code.chunks(self.text, self.pieces.next(), CHUNK))

    def learn(self, batch: Batch, losses: list[Array], norms: list[Array | None]) -> None:
        """What came out, chunk by chunk."""


class Buckets(Uniform):
    """Batches of one length, shuffled; of each length what does not fill a batch is left out of its epoch."""

    def epoch(self) -> list[Any]:
        whole, found = max(1, round(self.tokens / CHUNK)), []
        where = np.searchsorted(code.LENGTHS, self.text.lengths)
        for place, length in enumerate(code.LENGTHS):
            members = self.rng.permutation(np.flatnonzero(where == place))
            rows = min(len(members), whole * (CHUNK // length))
            found += [members[at : at + rows] for at in range(0, len(members) - rows + 1, rows or 1) if rows]
        return [found[i] for i in self.rng.permutation(len(found))]


class Packing(Uniform):
    """Rows that several sequences share; a batch is one chunk with as many real tokens as others have on average."""

    def epoch(self) -> list[Any]:
        order = self.rng.permutation(len(self.text.lengths))
        rows = max(1, round(self.batch * float(self.text.lengths.mean()) / code.LONGEST))
        return code.packed(self.text, order, rows)

    def choose(self, step: int, progress: float) -> Batch:
        return mean_over_tokens([self.pieces.next()])


class Ranks(Uniform):
    """By ranks of the latest known losses of a token, sorted anew twice an epoch, without reweighting."""

    def __init__(self, text: code.Text, batch: int, seed: int) -> None:
        super().__init__(text, batch, seed)
        self.losses = np.full(len(text.lengths), np.inf)
        self.every = max(1, len(self.losses) // (2 * batch))

    def choose(self, step: int, progress: float) -> Batch:
        size = len(self.losses)
        if step % self.every == 0:
            self.order = np.lexsort((self.rng.permutation(size), -self.losses))
        decay = (1.0 - min(progress, 1.0)) * math.log(PRESSURE) + 1e-6
        # The inverse of the distribution function of a rank r/N with density proportional to exp(-decay r/N).
        place = -np.log1p(self.rng.random(self.batch) * np.expm1(-decay)) / decay
        indices = self.order[np.minimum((place * size).astype(np.int64), size - 1)]
        return mean_over_tokens(code.chunks(self.text, indices, CHUNK), indices=indices)

    def learn(self, batch: Batch, losses: list[Array], norms: list[Array | None]) -> None:
        self.losses[batch.indices] = by_member(batch, losses) / self.text.lengths[batch.indices]


class Programs(NamedTuple):
    """A sampler, compiled."""

    init: Callable[..., Any]
    sample: Callable[..., isgd.Draw]
    observe: Callable[..., Any]
    refresh: Callable[..., Any]


@functools.cache
def programs(costs: tuple[float, ...], batch: int) -> Programs:
    """The estimator at its defaults, by the costs of sequences and the batch."""
    made = isgd.importance_sampler(len(costs), batch_size=batch, costs=np.array(costs, np.float32))
    observe = jax.jit(lambda state, draw, norms: made.observe(state, draw, norms=norms))
    return Programs(made.init, jax.jit(made.sample), observe, jax.jit(made.refresh))


class Ours(Uniform):
    """Importance sampling for the mean over tokens: the mean of sums over a sequence, over the mean length."""

    program = staticmethod(scored)

    def __init__(self, text: code.Text, batch: int, seed: int) -> None:
        super().__init__(text, batch, seed)
        self.programs, self.key = programs(tuple(text.costs.tolist()), batch), jax.random.key(seed)
        self.state, self.mean_length = self.programs.init(self.key), float(text.lengths.mean())

    def choose(self, step: int, progress: float) -> Batch:
        if step and step % REFRESH_EVERY == 0:
            self.state = self.programs.refresh(self.state)
        draw = self.programs.sample(jax.random.fold_in(self.key, step), self.state)
        indices = np.asarray(draw.indices)
        weights = np.asarray(draw.target / draw.probs) / (len(indices) * self.mean_length)
        chunks, rows = code.chunks(self.text, indices, CHUNK), []
        for chunk in chunks:
            own = np.zeros(len(chunk.tokens), np.float32)
            own[: len(chunk.members)] = weights[chunk.members]
            rows.append(own)
        return Batch(chunks, rows, indices, draw)

    def learn(self, batch: Batch, losses: list[Array], norms: list[Array | None]) -> None:
        self.state = self.programs.observe(self.state, batch.draw, by_member(batch, norms))


ARMS: dict[str, type[Uniform]] = {
    "uniform": Uniform,
    "packing": Packing,
    "buckets": Buckets,
    "ranks": Ranks,
    "ours": Ours,
}


def gradient_of(feed: Uniform, params: Tree, batch: Batch) -> tuple[list[Array], list[Array | None], Tree]:
    """Losses and norms of rows chunk by chunk, and the gradient of the batch."""
    found = [feed.program(params, rows_of(c), w) for c, w in zip(batch.chunks, batch.weights, strict=True)]
    losses, norms, gradients = zip(*found, strict=True)
    return list(losses), list(norms), functools.reduce(add, gradients)


def step(feed: Uniform, params: Tree, opt_state: Tree, number: int, rate: float, progress: float) -> tuple[Tree, Tree]:
    """Choose, learn, update; the rate decays by a cosine."""
    batch = feed.choose(number, progress)
    losses, norms, gradient = gradient_of(feed, params, batch)
    now = jnp.float32(rate * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0))))
    params, opt_state = update(params, opt_state, gradient, now)
    feed.learn(batch, losses, norms)
    feed.learnt += sum(int(np.count_nonzero(chunk.segments)) for chunk in batch.chunks)
    return params, opt_state


class Bench:
    """The arms from one pre-trained model.

    Args:
        params: of the model.
        texts: ``train``, ``valid`` and ``test``.
    """

    def __init__(self, params: Tree, texts: dict[str, code.Text]) -> None:
        self.params, self.texts = params, texts
        self.probe = _some(texts["train"], len(texts["valid"].lengths))
        self.ready = functools.cache(self._warm_up)

    def _warm_up(self, arm: str, batch: int) -> None:
        """Compile all, off the clock: each length of a chunk, and a refresh's second step."""
        feed, params = ARMS[arm](self.texts["train"], batch, 0), self.params
        opt_state = TX.init(params)
        for number in (0, 1, REFRESH_EVERY, REFRESH_EVERY + 1):
            params, opt_state = step(feed, params, opt_state, number, 0.0, 0.0)
        if arm != "packing":
            costs = feed.text.costs
            for length in (n for n in code.LENGTHS if costs.min() <= n <= costs.max()):
                rows = CHUNK // length
                empty = Row(*np.zeros((3, rows, length), np.int32))
                jax.block_until_ready(feed.program(params, empty, np.zeros(rows, np.float32)))

    def train(self, arm: str, trial: race.Trial, seed: int, meter: race.Meter) -> dict[str, Any]:
        """A run, measured at its end; ``merit`` is validation's cross-entropy of a token."""
        self.ready(arm, trial.batch)
        feed, params = ARMS[arm](self.texts["train"], trial.batch, seed), self.params
        opt_state, one_step = TX.init(params), functools.partial(step, feed)
        while meter.block(longest=1):
            at = (meter.steps, trial.rate, meter.progress)
            params, opt_state = meter.timed(one_step, params, opt_state, *at, steps=1)
        found = {name: perplexity(params, self.texts[name]) for name in ("valid", "test")}
        found["train"] = perplexity(params, self.probe)
        found["passes"] = feed.learnt / int(self.texts["train"].lengths.sum())
        if not all(map(math.isfinite, found.values())):
            return {"merit": None, **dict.fromkeys(found)}
        return {"merit": math.log(found["valid"]), **found}


def _some(text: code.Text, count: int) -> code.Text:
    return code.Text(text.tokens[:count], text.lengths[:count])


def pretrained(file: Path, text: code.Text) -> Tree:
    """The parameters that are kept in a file, or that are made now, by packing, and kept.

    Args:
        file: ``.npz``.
        text: what is learnt from.
    """
    first = nnx.split(Transformer(nnx.Rngs(PRETRAINING["seed"])), nnx.Param)[1]
    leaves, tree = jax.tree.flatten(first)
    if not file.exists():
        params, opt_state = first, TX.init(first)
        feed = Packing(text, 1, PRETRAINING["seed"])
        feed.batch = round(PRETRAINING["rows"] * code.LONGEST / float(text.lengths.mean()))
        for number in range(PRETRAINING["steps"]):
            progress = number / PRETRAINING["steps"]
            params, opt_state = step(feed, params, opt_state, number, PRETRAINING["rate"], progress)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
            np.savez(out, *map(np.asarray, jax.tree.leaves(params)))
    with np.load(file) as kept:
        return jax.tree.unflatten(tree, [jnp.asarray(kept[f"arr_{i}"]) for i in range(len(leaves))])


def main(given: list[str] | None = None) -> None:
    """Run what is missing, then print."""
    options = race.arguments(__doc__, tuple(ARMS), "runs/language", FULL.seeds).parse_args(given)
    plan, texts = race.plan(options, FULL, QUICK), code.texts()
    params = pretrained(options.folder / "pretrained.npz", texts["pretrain"])
    parts = {name: _some(texts[name], size) for name, size in SIZES.items()}
    for name, text in parts.items():
        print(f"{name}: {len(text.lengths):,} sequences, {text.lengths.mean():.0f} tokens on average, padded "
              f"{text.costs.mean():.0f}; perplexity before {perplexity(params, text):.3f}", flush=True)  # fmt: skip
    settings = {"model": [VOCABULARY, WIDTH, HEADS, BLOCKS], "sizes": SIZES, "pretraining": PRETRAINING}
    race.run(Bench(params, parts), options, ("ours",), MEASURES, plan, settings)


if __name__ == "__main__":
    main()
