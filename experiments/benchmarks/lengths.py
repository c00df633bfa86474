"""What costs are worth where sequences differ in length: variance of the gradient per token computed, and seconds.

Claim      On language modelling with 16 to 512 tokens a sequence, draws with ``costs=`` have at most 0.8 of the
           variance per token computed of draws without.

Functions of Python's own library, 16 to 512 tokens each, a vocabulary of 1,024, an NNX transformer (width 64, four
heads, two blocks) trained by Adam on uniform draws. A sequence is padded to the next power of two, its cost is that
length, and a batch of 64 draws is computed in chunks of 256 tokens of one length; what is computed on padding, of
sequences and of chunks, counts. Two targets, by the same loss, the mean over a sequence's tokens: the mean over
sequences (a_n = 1/N), and the mean over tokens (``example_weights`` a_n ∝ length).

Variance is the exact Tr Cov of one independent draw by the estimator's proposal, from the norms of all sequences: with
scores measured 30 updates before, all options at their defaults, and with the norms of that moment and no uniform
fraction, the least there is. Tokens are those computed on 400 draws, seconds those of 8 steps in turn.

Command    python experiments/benchmarks/lengths.py
Time       ten minutes on a busy core

Result (one seed; variance times tokens computed, times seconds, over those of draws without costs): **0.8 is missed.**

                                        after 50 updates        after 200
    mean over sequences, with costs     0.85 tokens  0.76 s     0.87 tokens  0.67 s
    the same, uniform draws             1.16         1.37       1.17         1.31
    mean over tokens, with costs        0.93         0.70       0.96         0.88
    the same, uniform draws             1.03         0.82       1.04         0.82
    the least there is, with costs      0.84, 0.85              0.87, 0.87

Functions are mostly short: half have fewer than 50 tokens. Were all norms alike, the second moment times cost would be
(mean √c)² / mean c = 0.82 of that without costs; ours comes near. The mean over tokens is harder: long sequences count
for more, so their weights grow where costs make them rare. Seconds fall further than tokens, since attention costs more
than in proportion; the machine was busy.
"""

import argparse
import ast
import functools
import io
import sysconfig
import time
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import isgd_jax as isgd

LENGTHS = (16, 32, 64, 128, 256, 512)
"""What sequences are padded to."""
CHUNK = 256
"""Tokens in a program's batch, but for longer sequences."""
VOCABULARY, WIDTH, HEADS, BLOCKS = 1024, 64, 4, 2
DRAWS, STALE = 64, 30


class Corpus(NamedTuple):
    """Sequences by the length they are padded to; number n is row ``rows[n]`` of ``parts[where[n]]``."""

    parts: tuple[dict[str, np.ndarray], ...]
    where: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray

    @property
    def costs(self) -> np.ndarray:
        """Tokens that are computed for each sequence."""
        return np.asarray(LENGTHS, np.float32)[self.where]


def functions() -> Iterator[list[str]]:
    """The tokens of each function and method of Python's library, file by file."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield from functions_of(file)


def functions_of(file: Path) -> Iterator[list[str]]:
    """The tokens of each function and method of a file."""
    text = file.read_text(encoding="utf-8", errors="replace")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = text.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]
            source = "".join(line[node.col_offset :] for line in lines)
            try:
                yield [
                    t.string or t.exact_type.__str__() for t in tokenize.generate_tokens(io.StringIO(source).readline)
                ]
            except (tokenize.TokenError, IndentationError):
                continue  # a multi-line string that is indented less than its function


@functools.cache
def corpus(size: int) -> Corpus:
    """So many of them, drawn from a fixed seed; the most frequent tokens have numbers, all others share one."""
    found = [tokens for tokens in functions() if LENGTHS[0] <= len(tokens) <= LENGTHS[-1]]
    found = [found[i] for i in np.random.default_rng(0).permutation(len(found))[:size]]
    common = Counter(token for tokens in found for token in tokens).most_common(VOCABULARY - 2)
    numbers = {token: at + 2 for at, (token, _) in enumerate(common)}
    lengths = np.array([len(tokens) for tokens in found])
    where = np.searchsorted(LENGTHS, lengths)
    parts, rows = [], np.zeros(len(found), np.int64)
    for place, length in enumerate(LENGTHS):
        members = np.flatnonzero(where == place)
        rows[members] = np.arange(len(members))
        tokens = np.zeros((len(members), length + 1), np.int32)
        for row, n in enumerate(members):
            tokens[row, 1 : lengths[n] + 1] = [numbers.get(token, 1) for token in found[n]]
        parts.append({"tokens": tokens, "length": lengths[members].astype(np.int32)})
    return Corpus(tuple(parts), where, rows, lengths)


class Block(nnx.Module):
    """Attention to what came before, and a perceptron of two layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attend = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attend(self.norms[0](x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    """A small causal language model."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed, self.place = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs), nnx.Embed(LENGTHS[-1], WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
        self.norm, self.out = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.place(jnp.arange(tokens.shape[0]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.out(self.norm(x))


@functools.cache
def model() -> tuple[Any, Any]:
    """Its graph and first parameters."""
    return nnx.split(Transformer(nnx.Rngs(0)), nnx.Param)


def loss_fn(params: Any, example: dict[str, jax.Array]) -> jax.Array:
    """The mean over the tokens of ONE sequence."""
    tokens, length = example["tokens"], example["length"]
    logits = nnx.merge(model()[0], params)(tokens[:-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])
    return jnp.sum(jnp.where(jnp.arange(losses.shape[0]) < length, losses, 0.0)) / length.astype(losses.dtype)


@jax.jit
def part(params: Any, batch: Any, weights: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    """Of a chunk: losses, norms, and the sum of weight times gradient."""
    losses, grads = isgd.per_example_value_and_grad(loss_fn)(params, batch)
    return losses, isgd.norms(grads), isgd.weighted_mean(grads, weights * weights.shape[0])


def rows_of(length: int) -> int:
    """Sequences in a chunk."""
    return max(1, CHUNK // length)


def chunks(data: Corpus, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """``(place of the length, positions in indices)`` of each chunk; the last of a length may be filled in part."""
    for place, length in enumerate(LENGTHS):
        members = np.flatnonzero(data.where[indices] == place)
        rows = rows_of(length)
        yield from ((place, members[at : at + rows]) for at in range(0, len(members), rows))


def tokens_computed(data: Corpus, indices: np.ndarray) -> int:
    """Of a batch, padding included."""
    return sum(rows_of(LENGTHS[place]) * LENGTHS[place] for place, _ in chunks(data, indices))


def of_batch(params: Any, data: Corpus, indices: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
    """Losses and norms in the order of the indices, and the sum of weight times gradient."""
    losses, norms, total = np.zeros(len(indices)), np.zeros(len(indices)), None
    found = []
    for place, positions in chunks(data, indices):
        rows = rows_of(LENGTHS[place])
        at = np.resize(data.rows[indices[positions]], rows)  # what fills a chunk is a sequence again, of weight 0
        full = np.zeros(rows, np.float32)
        full[: len(positions)] = weights[positions]
        batch = {name: values[at] for name, values in data.parts[place].items()}
        found.append((positions, part(params, batch, full)))
    for positions, (some_losses, some_norms, gradient) in found:
        losses[positions], norms[positions] = some_losses[: len(positions)], some_norms[: len(positions)]
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
    return losses, norms, total


def targets(data: Corpus) -> dict[str, np.ndarray]:
    """a_n of each target."""
    ones = np.ones(len(data.lengths))
    return {"sequences": ones / ones.sum(), "tokens": data.lengths / data.lengths.sum()}


@functools.cache
def sampler(size: int, target: str, has_costs: bool) -> isgd.BatchSampler:
    """The estimator at its defaults."""
    data = corpus(size)
    return isgd.importance_sampler(
        size,
        batch_size=DRAWS,
        costs=data.costs if has_costs else None,
        example_weights=targets(data)[target].astype(np.float32) if target == "tokens" else None,
    )


class Measured(NamedTuple):
    """Of a way to draw: Tr Cov of one draw, what it costs in expectation, tokens computed and seconds a draw."""

    variance: float
    cost: float
    tokens: float
    seconds: float


def measured(
    params: Any, size: int, scores: np.ndarray, norms: np.ndarray, seed: int
) -> dict[tuple[str, str], Measured]:
    """Both targets, by each way to draw."""
    data, everything, found = corpus(size), np.arange(size), {}
    for target, a in targets(data).items():
        mean = of_batch(params, data, everything, a.astype(np.float32))[2]
        square_of_mean = sum(float(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(mean))
        draws = {}
        for name, has_costs in (("without", False), ("with", True)):
            made = sampler(size, target, has_costs)
            state = made.refresh(made.record(made.init(), everything, scores.astype(np.float32), version=0))
            probs = np.asarray(isgd.samplers.probabilities(state.proposal.law), np.float64)
            sample = jax.jit(made.sample)
            draws[name] = probs, [np.asarray(sample(jax.random.key(seed + i), state).indices) for i in range(400)]
        rng = np.random.default_rng(seed)
        uniform = np.full(size, 1.0 / size)
        draws["uniform"] = uniform, [rng.choice(size, DRAWS, replace=False) for _ in range(400)]
        for name, exponent in (("ideal without", 0.0), ("ideal with", 0.5)):
            probs = np.abs(a) * norms / data.costs**exponent
            probs = probs / probs.sum()
            draws[name] = probs, [rng.choice(size, DRAWS, p=probs) for _ in range(400)]
        seconds: dict[str, list[float]] = {name: [] for name in draws}
        for at in range(8):
            for name, (_, batches) in draws.items():
                began = time.perf_counter()
                jax.block_until_ready(of_batch(params, data, batches[at], np.full(DRAWS, 1.0 / DRAWS, np.float32))[2])
                seconds[name].append((time.perf_counter() - began) / DRAWS)
        for name, (probs, batches) in draws.items():
            variance = float(np.sum(np.square(a * norms) / probs)) - square_of_mean
            tokens = float(np.mean([tokens_computed(data, batch) for batch in batches])) / DRAWS
            found[target, name] = Measured(variance, float(probs @ data.costs), tokens, float(np.mean(seconds[name])))
    return found


def main() -> None:
    """Train, stop now and then, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=1_000)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 200], help="when it is measured")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    size, data = options.sequences, corpus(options.sequences)
    shares = np.bincount(data.where, minlength=len(LENGTHS)) / size
    told = ", ".join(f"{length}: {100 * share:.0f} %" for length, share in zip(LENGTHS, shares, strict=True))
    print(f"{size} sequences, {data.lengths.mean():.0f} tokens on average, padded {data.costs.mean():.0f} ({told})")
    tx = optax.adam(1e-3)
    params, rng = model()[1], np.random.default_rng(options.seed)
    opt_state = tx.init(params)
    everything, even = np.arange(size), np.full(size, 1.0 / size, np.float32)
    update = jax.jit(lambda params, opt_state, gradient: tx.update(gradient, opt_state, params))
    scores = None
    for step in range(max(options.steps) + 1):
        if step + STALE in options.steps:
            scores = of_batch(params, data, everything, even)[1]
        if step in options.steps:
            losses, norms, _ = of_batch(params, data, everything, even)
            print(f"\nafter {step} steps, mean loss {losses.mean():.2f}; over draws without costs of the same target")
            print(f"{'target':10} {'draws':14} tokens a draw  variance  x cost  x tokens  x seconds", flush=True)
            found = measured(params, size, scores, norms, options.seed)
            for (target, name), one in found.items():
                base = found[target, "ideal without" if name.startswith("ideal") else "without"]
                variance, cost, tokens, seconds = (x / y for x, y in zip(one, base, strict=True))
                told = f"{variance:8.2f}  {variance * cost:6.2f}  {variance * tokens:8.2f}  {variance * seconds:9.2f}"
                print(f"{target:10} {name:14} {one.tokens:13.0f}  {told}", flush=True)
        indices = rng.choice(size, DRAWS, replace=False)
        gradient = of_batch(params, data, indices, np.full(DRAWS, 1.0 / DRAWS, np.float32))[2]
        updates, opt_state = update(params, opt_state, gradient)
        params = optax.apply_updates(params, updates)


if __name__ == "__main__":
    main()
