"""Language: packages are kept apart, and packing, chunks and draws compute what single sequences would."""

import jax
import language
import numpy as np
import pytest
from benchmarks import lengths
from equal_seconds import code, race

LENGTHS = np.array([16, 20, 33, 17, 120, 31, 40, 250, 64, 16])


@pytest.fixture(scope="module")
def text() -> code.Text:
    rng = np.random.default_rng(0)
    return code.Text(tuple(rng.integers(1, 99, n).astype(np.int32) for n in LENGTHS), LENGTHS)


@pytest.fixture(scope="module")
def short(text) -> code.Text:
    """Those that few programs compute."""
    few = np.flatnonzero(LENGTHS <= 32)
    return code.Text(tuple(text.tokens[n] for n in few), LENGTHS[few])


@pytest.fixture(scope="module")
def params():
    """Of a model of one block: half as much to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lengths, "BLOCKS", 1)
        language.graph.cache_clear()
        yield language.nnx.split(language.Transformer(language.nnx.Rngs(0)), language.nnx.Param)[1]
    language.graph.cache_clear()


def sequences_in(chunk: code.Chunk) -> list[bytes]:
    found = []
    for tokens, segments, places in zip(chunk.tokens, chunk.segments, chunk.places, strict=True):
        for number in range(1, segments.max() + 1):
            assert list(places[segments == number]) == list(range(np.sum(segments == number)))
            found.append(tokens[segments == number].tobytes())
        assert not tokens[segments == 0].any()
    return found


def test_every_sequence_is_computed_once(text):
    everyone = sorted(tokens.tobytes() for tokens in text.tokens)
    for made in (code.chunks(text, np.arange(10), 256), code.packed(text, np.arange(10)[::-1], 1)):
        assert sorted(name for chunk in made for name in sequences_in(chunk)) == everyone
    made = code.chunks(text, np.array([7, 0, 0, 4]), 256)
    assert sorted(np.concatenate([chunk.members for chunk in made])) == [0, 1, 2, 3]
    for chunk in made:
        for row, member in enumerate(chunk.members):
            n = [7, 0, 0, 4][member]
            np.testing.assert_array_equal(chunk.tokens[row, : LENGTHS[n]], text.tokens[n])
    # 607 tokens cannot stand in two rows of 256; first fit needs three.
    assert len(code.packed(text, np.argsort(-LENGTHS), 1)) == 3
    np.testing.assert_array_equal(text.costs, [16, 32, 64, 32, 128, 32, 64, 256, 64, 16])


def test_packages_are_kept_apart(tmp_path):
    for name in ("a.py", "b/__init__.py", "b/deep/more.py", "b/tests/left.py", "test/out.py", "_c.py", "d/no.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found = code.packages(tmp_path)
    assert {name: len(files) for name, files in found.items()} == {"a.py": 1, "b": 2}
    parts = {code.part_of(name) for name in code.packages()}
    assert parts == {"pretrain", "train", "valid", "test"}


def test_epochs_of_arms_use_what_they_say(text):
    for name, batch in (("uniform", 3), ("buckets", 1)):
        epoch = language.ARMS[name](text, batch, 0).epoch()
        used = np.concatenate(epoch)
        assert len(set(used)) == len(used)
        if name == "uniform":
            assert [len(members) for members in epoch] == [3, 3, 3]
        else:
            assert all(len(set(text.costs[members])) == 1 for members in epoch)
    ranks = language.Ranks(text, 4, 0)
    ranks.losses = np.arange(10.0)
    counts = np.bincount([n for at in range(300) for n in ranks.choose(at, 0.0).indices], minlength=10)
    # The density falls from 100 to 1 over ten ranks: the first tenth has 0.37 / 0.99 of it; five standard errors.
    assert counts[9] / counts.sum() == pytest.approx((1 - 100**-0.1) / 0.99, abs=0.07)


@pytest.mark.slow
def test_rows_that_are_shared_have_the_losses_of_single_sequences(short, params):
    """And so have padding and chunks; the gradient of all draws is the weighted sum."""
    size = len(short.lengths)
    alone = np.zeros(size)
    for chunk in code.chunks(short, np.arange(size), 256):
        alone[chunk.members] = np.asarray(language.sums(params, language.rows_of(chunk)))[: len(chunk.members)]
    [shared] = code.packed(short, np.arange(size), 1)
    assert shared.segments.max() == size
    np.testing.assert_allclose(language.sums(params, language.rows_of(shared)), [alone.sum()], rtol=1e-4)
    feed = language.Ours(short, 5, 0)
    batch = feed.choose(0, 0.0)
    losses, norms, gradient = language.gradient_of(feed, params, batch)
    np.testing.assert_allclose(language.by_member(batch, losses), alone[batch.indices], rtol=1e-3)
    weights = np.zeros(size, np.float32)
    np.add.at(weights, batch.indices, batch.draw.target / batch.draw.probs / 5 / short.lengths.mean())
    [rows] = code.chunks(short, np.arange(size), 256)
    truth = language.plain(params, language.rows_of(rows), np.resize(weights[rows.members], len(rows.tokens)))[2]
    for found, expected in zip(*map(jax.tree.leaves, (gradient, truth)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert (language.by_member(batch, norms) > 0).all()


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # Optax's Adam needs it
def test_an_arm_learns(short, params):
    bench = language.Bench(params, {"train": short, "valid": short, "test": short})
    found = bench.train("ours", race.Trial(3e-3, 5, 1.0), 0, race.Meter(1.0, price=1 / 30))
    assert found["test"] == found["train"] < language.perplexity(params, short) / 2
    assert found["passes"] > 10
