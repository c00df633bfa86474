"""The experiments run, at their tiniest, and the rival methods are what they say they are."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import honest
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paper
import prompts
import pytest
from benchmarks import equivalent_batch, lengths
from selection import bench, contest, orders, problems, pruning, race, rivals, sources

from isgd_jax.sampling import score_table

SIZE, NUM_CLASSES, WIDTH = 96, 3, 4
STEPS = 4_000


@pytest.fixture(scope="module")
def problem() -> contest.Problem:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, NUM_CLASSES, SIZE)
    inputs = rng.normal(size=(SIZE, WIDTH)) + labels[:, None]
    split = {"x": jnp.asarray(inputs, jnp.float32), "y": jnp.asarray(labels, jnp.int32)}
    return contest.Problem("blobs", (8,), NUM_CLASSES, 8, split, split, split)


def mean_counts(choices: contest.Choice, weighted: bool) -> np.ndarray:
    """How often each example is chosen in a step, on average, times its weight if asked."""
    weights = choices.weights if weighted else jnp.ones_like(choices.weights)
    counts = jnp.zeros(SIZE).at[choices.indices.reshape(-1)].add(weights.reshape(-1))
    return np.asarray(counts) / len(choices.indices)


def choices_of(method: contest.Method, problem: contest.Problem, memory: object, steps: int = STEPS) -> contest.Choice:
    """The choices of many steps at fixed parameters, one after another."""
    params = problem.init(jax.random.key(1))

    def body(memory: object, key: jax.Array) -> tuple[object, contest.Choice]:
        if isinstance(memory, rivals.Sampled):  # any draw of a stretch: nothing is learnt that would move its step on
            memory = method.refresh(key, memory._replace(key=key), params, problem.train, jnp.int32(0))[0]
            memory = memory._replace(place=jax.random.randint(key, (), 0, method.refresh_every))
        choice, memory = method.choose(key, memory, params, problem.train, jnp.float32(0.5))
        return memory, choice

    run = jax.jit(lambda memory, keys: jax.lax.scan(body, memory, keys)[1])
    return run(memory, jax.random.split(jax.random.key(2), steps))


def learnt(name: str, method: contest.Method, problem: contest.Problem) -> object:
    """A memory in which the method has something to say: losses or scores that differ by much."""
    memory, _ = method.start(jax.random.key(3), problem.train)
    worth = jnp.exp(jax.random.normal(jax.random.key(4), (SIZE,)))
    if name == "presample":
        return memory._replace(is_open=jnp.asarray(True))
    if name in ("prune", "ranks"):
        order = {"order": jnp.argsort(-worth)} if name == "ranks" else {}
        return memory._replace(losses=worth, **order)
    if name == "ours":
        indices = jnp.arange(SIZE, dtype=jnp.int32)
        scored = score_table.record(memory.state.table, indices, worth, version=0)[0]
        memory = memory._replace(state=memory.state._replace(table=scored))
        return method.refresh(jax.random.key(0), memory, None, problem.train, jnp.int32(0))[0]
    return memory


@pytest.mark.parametrize("name", ["presample", "prune", "ours"])
def test_unbiased_methods_are(name: str, problem: contest.Problem) -> None:
    # Every example counts M/N a step. 6 standard errors: a step's count has a variance of at most M times the largest
    # weight over N times the number of draws.
    make = {"ours": lambda p: rivals.ours(p, sweep=0.0, every=50, mixture=0.3)}.get(name, rivals.METHODS[name])
    method = make(problem)
    found = mean_counts(choices_of(method, problem, learnt(name, method, problem)), weighted=True)
    if name == "prune":  # the same for all examples, but more than one: fewer steps make an epoch
        assert 1.0 < found.sum() / problem.batch_size < 2.0
        found = found * (problem.batch_size / found.sum())
    expected = problem.batch_size / SIZE
    largest = 1 / 0.1  # the mixtures in use keep every weight at or below 10
    assert np.abs(found - expected).max() < 6 * np.sqrt(expected * largest / STEPS)
    assert abs(found.sum() - problem.batch_size) < 0.02 * problem.batch_size


@pytest.mark.slow
def test_ranks_fall_exponentially_from_first_to_last(problem: contest.Problem) -> None:
    # At half of the budget the first rank is 10 times likelier than the last; thirds of the ranks, 5 standard errors.
    method = rivals.ranking(problem)
    memory = learnt("ranks", method, problem)
    counts = mean_counts(choices_of(method, problem, memory), weighted=False)[np.asarray(memory.order)]
    share = counts.reshape(3, -1).sum(axis=1) / problem.batch_size
    edges = -np.expm1(-np.log(10.0) * np.linspace(0, 1, 4))
    np.testing.assert_allclose(share, np.diff(edges) / edges[-1], atol=5 * 0.5 / np.sqrt(STEPS * problem.batch_size))


@pytest.mark.slow
def test_the_reducible_loss_decides(problem: contest.Problem) -> None:
    method = rivals.rho_loss(problem)
    memory, cost = method.start(jax.random.key(0), problem.train)
    assert cost > problem.num_examples * rivals.RHO_EPOCHS
    hopeless = memory._replace(irreducible=jnp.where(jnp.arange(SIZE) < SIZE // 2, 1e3, 0.0))
    counts = mean_counts(choices_of(method, problem, hopeless, steps=24), weighted=False)
    assert counts[: SIZE // 2].sum() < 0.1 * counts.sum()  # chosen only where a candidate batch has too few others


@pytest.mark.slow
def test_half_of_what_is_below_the_mean_is_left_out(problem: contest.Problem) -> None:
    method = pruning.infobatch(problem)
    memory = learnt("prune", method, problem)
    low = np.asarray(memory.losses < memory.losses.mean())
    memory = memory._replace(epochs=memory.epochs._replace(used=memory.epochs.count))
    _, begun = method.choose(jax.random.key(0), memory, None, problem.train, jnp.float32(0.5))
    kept = np.zeros(SIZE, bool)
    kept[np.asarray(begun.epochs.order[: int(begun.epochs.count)])] = True
    assert kept[~low].all()
    assert 0 < kept[low].sum() < low.sum()
    np.testing.assert_array_equal(np.asarray(begun.weights), np.where(low, 2.0, 1.0))
    _, last = method.choose(jax.random.key(0), memory, None, problem.train, jnp.float32(0.9))
    assert int(last.epochs.count) == SIZE
    assert float(last.weights.max()) == 1.0


def epochs_with_losses(
    method: contest.Method, problem: contest.Problem, losses: jax.Array, steps: int
) -> tuple[contest.Choice, object]:
    """Choices of a method that learns the same loss of an example each time, and what it remembered at each."""

    def body(memory: object, key: jax.Array) -> tuple[object, tuple[contest.Choice, object]]:
        choice, memory = method.choose(key, memory, None, problem.train, jnp.float32(0.5))
        return method.learn(memory, choice, losses[choice.indices], None, jnp.int32(0)), (choice, memory)

    memory, _ = method.start(jax.random.key(3), problem.train)
    keys = jax.random.split(jax.random.key(4), steps)
    return jax.jit(lambda memory: jax.lax.scan(body, memory, keys)[1])(memory)


def test_random_subsets_repeat_nothing_and_are_a_uniform_run(problem: contest.Problem) -> None:
    # All that RS2 without replacement asks for; and other draws than the uniform run's of the same seed.
    made = {}
    for name in ("uniform", "rs2"):
        method = rivals.METHODS[name](problem)
        memory, _ = method.start(jax.random.key(3), problem.train)
        choices = choices_of(method, problem, memory, steps=3 * SIZE // problem.batch_size)
        made[name] = np.asarray(choices.indices).reshape(3, SIZE)
        np.testing.assert_array_equal(np.sort(made[name], axis=1), np.arange(SIZE)[None].repeat(3, axis=0))
    assert (made["uniform"] != made["rs2"]).mean() > 0.9


def test_weights_of_resolved_pruning_are_epochs_over_epochs_there(problem: contest.Problem) -> None:
    # RePB's rule, replayed from who was in: batches of 8 of 96, some 60 epochs. Low losses are there in half of them at
    # least (they leave with 1/2, come back with 1/2), and all weigh alike in the long run: within 12 % here.
    method = pruning.repb(problem)
    losses = jnp.exp(jax.random.normal(jax.random.key(1), (SIZE,)))
    choices, memories = epochs_with_losses(method, problem, losses, 600)
    numbers = np.asarray(memories.number, int)
    begun = np.flatnonzero(np.diff(numbers, prepend=0))
    is_in = np.asarray(memories.is_in)[begun]
    times = np.cumsum(is_in, axis=0)
    for step in (0, 1, 100, 599):
        epoch = numbers[step]
        expected = epoch / times[epoch - 1][np.asarray(choices.indices[step])]
        np.testing.assert_allclose(choices.weights[step], expected, rtol=1e-6)
        assert is_in[epoch - 1][np.asarray(choices.indices[step])].all()
    share = is_in.mean(axis=0)
    high = np.asarray(losses) > 3.0
    assert share[np.argmax(losses)] == 1  # never below the mean of its batch
    assert 0.45 < share[np.asarray(losses) < 0.4].mean() < 0.7
    weighed = np.zeros(SIZE)
    np.add.at(weighed, np.asarray(choices.indices[100:]), np.asarray(choices.weights[100:]))
    assert abs(weighed[high].mean() / weighed[~high].mean() - 1) < 0.12


@pytest.mark.slow
def test_the_largest_losses_of_a_random_subset_are_kept(problem: contest.Problem) -> None:
    # By rank: kept of a subset of 72 if it is among the 61 largest there; hypergeometric, 5 standard errors. Losses are
    # below that of the unknown.
    from scipy.stats import hypergeom

    worth = np.random.default_rng(5).permutation(SIZE).astype(np.float32)
    _, memories = epochs_with_losses(pruning.orderdp(problem), problem, jnp.asarray(worth / 40), 2_100)
    counts, begun = np.asarray(memories.epochs.count), np.asarray(memories.begun)
    assert set(counts) == {61}
    first = np.flatnonzero(np.diff(begun, prepend=0))[3:]  # by then every loss is known
    kept = np.zeros((len(first), SIZE))
    for row, orders_ in zip(kept, np.asarray(memories.epochs.order)[first], strict=True):
        row[orders_[:61]] = 1
    above = SIZE - 1 - worth  # how many have a larger loss
    expected = 72 / SIZE * hypergeom.cdf(60, SIZE - 1, above, 71)
    assert np.abs(kept.mean(axis=0) - expected).max() < 5 * 0.5 / np.sqrt(len(first))


@pytest.mark.slow
def test_windows_of_groups_slide_from_easy_to_hard(problem: contest.Problem) -> None:
    # Five lumps of losses are the five groups; epochs take the four lower and the four upper in turn.
    lump = np.arange(SIZE) % 5
    noise = 0.01 * np.random.default_rng(6).random(SIZE)
    losses = jnp.asarray([0.0, 1.0, 2.0, 4.0, 8.0])[lump] + jnp.asarray(noise, jnp.float32)
    np.testing.assert_array_equal(pruning.groups_by_loss(losses, 5), lump)
    _, memories = epochs_with_losses(pruning.seta(problem), problem, losses, 120)
    first = np.flatnonzero(np.diff(np.asarray(memories.begun), prepend=0))
    found = []
    for step in first:
        chosen = np.asarray(memories.epochs.order)[step][: int(memories.epochs.count[step])]
        found.append(sorted(set(lump[chosen])))
    assert found[0] == [0, 1, 2, 3, 4]
    assert found[6:10] in ([[0, 1, 2, 3], [1, 2, 3, 4]] * 2, [[1, 2, 3, 4], [0, 1, 2, 3]] * 2)
    method = pruning.seta(problem)
    last = jax.tree.map(lambda leaf: leaf[-1], memories)
    last = last._replace(epochs=last.epochs._replace(used=last.epochs.count))
    _, whole = method.choose(jax.random.key(0), last, None, problem.train, jnp.float32(0.9))
    assert int(whole.epochs.count) == round(0.9 * SIZE)


def test_an_epoch_holds_a_batch_at_least() -> None:
    chosen = jnp.arange(SIZE) < 3
    epochs = orders.epochs_of(jax.random.key(0), chosen, 8)
    assert int(epochs.count) == 8
    assert set(np.asarray(epochs.order[:3])) == {0, 1, 2}


@pytest.mark.slow
def test_balanced_orders_are_permutations_with_small_running_sums(problem: contest.Problem) -> None:
    # At fixed parameters, against the definition: signs one after another from whole gradients, GraB's algorithm 4.
    # 94 of 96 examples fill batches; after a few epochs the largest running sum is below half of what shuffling has.
    left = jax.tree.map(lambda leaf: leaf[: SIZE - 2], problem.train)
    small = problem._replace(train=left)
    method, params = orders.grab(small), small.init(jax.random.key(1))
    stacked = contest.isgd.stacked_per_example_grads(small.loss_fn)(params, left)
    flat = np.concatenate([np.asarray(leaf, np.float64).reshape(SIZE - 2, -1) for leaf in jax.tree.leaves(stacked)], 1)

    @jax.jit
    def step(memory: orders.Balancing) -> tuple[orders.Balancing, jax.Array]:
        choice, memory = method.choose(jax.random.key(0), memory, params, left, jnp.float32(0))
        batch = jax.tree.map(lambda leaf: leaf[choice.indices], left)
        grads = contest.isgd.per_example_grads(small.loss_fn)(params, batch)
        mean = contest.isgd.weighted_mean(grads, choice.weights)
        measured = method.measure(memory, grads, mean)
        return method.learn(memory, choice, jnp.zeros(8), measured, jnp.int32(0)), choice.indices

    memory, _ = method.start(jax.random.key(2), left)
    order, mean = np.asarray(memory.order), np.zeros(flat.shape[1])
    sums = []
    for _ in range(8):
        drawn = np.concatenate([(out := step(memory), memory := out[0])[0][1] for _ in range(11)])
        np.testing.assert_array_equal(drawn, order[:88])
        centered = flat[order] - flat[order].mean(axis=0)
        sums.append(np.abs(np.cumsum(centered, axis=0)).max())
        total, fronts, backs = np.zeros_like(mean), [], []
        for index in drawn:
            add = flat[index] - mean
            if total @ add < 0:
                total, fronts = total + add, [*fronts, index]
            else:
                total, backs = total - add, [index, *backs]
        mean = flat[drawn].mean(axis=0)
        order = np.array([*fronts, *order[88:], *backs])
        assert sorted(order) == list(range(SIZE - 2))
    shuffled = [flat[np.random.default_rng(seed).permutation(SIZE - 2)] - flat.mean(axis=0) for seed in range(20)]
    usual = np.mean([np.abs(np.cumsum(centered, axis=0)).max() for centered in shuffled])
    assert np.mean(sums[-3:]) < 0.5 * usual
    assert method.choose(jax.random.key(0), memory, params, left, jnp.float32(0))[0].cost > problem.batch_size


@pytest.mark.slow
def test_a_run_that_diverges_ends_there_and_a_whole_one_counts_its_draws(problem: contest.Problem) -> None:
    method = rivals.METHODS["uniform"](problem)
    programs = contest.compile_method(problem, method)
    lost = contest.run(problem, method, programs, rate=1e9, seed=0, passes=8_000)
    assert (lost["train_loss"], lost["steps"]) == (None, 10)
    whole = contest.run(problem, method, programs, rate=0.01, seed=0, passes=8_000)
    assert whole["steps"] == 1_000
    assert whole["top_share"] == pytest.approx(1 / SIZE, rel=0.02)
    assert whole["core_seconds"] > 0


@pytest.mark.slow
def test_measurements_of_a_split_are_their_definitions() -> None:
    # Counted by hand from the logits of a model with one layer.
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 2)).astype(np.float32), np.repeat([0, 1, 3], [20, 20, 10]).astype(np.int32)
    split = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    problem = contest.Problem("none", (), 4, 8, split, split, split)
    params = problem.init(jax.random.key(0))
    found = contest._evaluator(problem)(params, split)
    logits = np.asarray(jax.vmap(problem.logits_fn, (None, 0))(params, split))
    confidence, wrong = np.asarray(jax.nn.softmax(logits)).max(axis=1), logits.argmax(axis=1) != y
    assert float(found.worst_class) == pytest.approx(max(wrong[y == k].mean() for k in (0, 1, 3)))
    bins = np.floor(confidence * 15)
    gaps = [abs(np.sum(confidence[bins == b] - ~wrong[bins == b])) for b in np.unique(bins)]
    assert float(found.calibration) == pytest.approx(sum(gaps) / 50, abs=1e-6)
    assert contest.top_share(np.array([5, *[1] * 99])) == pytest.approx(5 / 104)


@pytest.mark.parametrize(("kind", "wrong", "rarest"), [("noise 40 %", 0.36, 1.0), ("imbalance 1:100", 0.0, 0.01)])
def test_labels_are_spoilt_as_told(kind: str, wrong: float, rarest: float) -> None:
    # 40 % drawn at random from ten classes are wrong in 36 %; a hundredth of 2,000 is 20, five standard deviations.
    labels = np.repeat(np.arange(10), 2_000).astype(np.int32)
    arrays = {"image": labels[:, None].astype(np.float32), "label": labels}
    dataset = problems.data.from_arrays(arrays, arrays)
    made = problems.make(dataset, kind, problems.Scale(20_000, (4,), 8, 1))
    every = {name: np.concatenate([made.train[name], made.valid[name]]) for name in ("x", "y")}
    mean, std = dataset.statistics["image"]
    true = np.rint(every["x"][:, 0] * std + mean).astype(int)
    assert abs((true != every["y"]).mean() - wrong) < 0.02
    counts = np.bincount(true, minlength=10)
    assert abs(counts[9] - 2_000 * rarest) <= 5 * np.sqrt(20)


@pytest.mark.slow
def test_sources_are_held_out_by_whole_files() -> None:
    # About one file in five, and counts of trigrams are whole, 254 a window.
    root = Path(sysconfig.get_path("stdlib"))
    files = [path.relative_to(root) for package in sources.PACKAGES for path in (root / package).rglob("*.py")]
    held_out = np.mean([sources._is_held_out(path) for path in files])
    assert 0.1 < held_out < 0.3
    made = problems.load(sources.NAME)
    for split in (made.train, made.test):
        counts = np.square(np.asarray(split["x"], np.float64))
        np.testing.assert_allclose(counts, np.rint(counts), atol=1e-4)
        assert (np.rint(counts).sum(axis=1) == sources.WINDOW - 2).all()
        assert np.bincount(split["label"], minlength=10).min() > 20


def test_a_race_of_pictures_is_run_by_a_resnet() -> None:
    arrays = {"image": np.zeros((20, 8, 8, 1), np.float32), "label": np.arange(20, dtype=np.int32) % 10}
    scale, dataset = problems.Scale(20, (4,), 8, 1), problems.data.from_arrays(arrays, arrays)
    made = problems.make(dataset, "clean", scale, "resnet")
    params = jax.eval_shape(made.init, jax.random.key(0))
    logits = jax.eval_shape(made.logits_fn, params, {"x": made.train["x"][0]})
    assert made.name.endswith("clean, resnet")
    assert logits.shape == (10,)
    flat = {**arrays, "image": arrays["image"][:, 0, :, 0]}
    with pytest.raises(ValueError, match="expected pictures"):
        problems.make(problems.data.from_arrays(flat, flat), "clean", scale, "resnet")


@pytest.mark.slow
def test_an_honest_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Twice: the second time everything is there already, and the table is the same.
    command = ["tables", "--dataset", "digits", "--scale", "tiny", "--seeds", "2", "--kinds", "clean"]
    command += ["--methods", "uniform", "prune", "--budgets", "passes", "--folder", str(tmp_path)]
    printed = []
    for _ in range(2):
        honest.main([*command, "--data-dir", str(tmp_path / "data")])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "train loss against uniform" in printed[0]
    assert (tmp_path / "digits-tiny.png").is_file()
    runs = [line for line in (tmp_path / "digits-tiny.jsonl").read_text().splitlines() if '"prune"' in line]
    assert len(runs) >= len(honest.RATES) * len(honest.TUNING_SEEDS) + 2


def test_verdicts_go_by_the_intervals() -> None:
    def row(name: str, errors: list[float], losses: list[float]) -> honest.Row:
        runs = [{"test_error": e, "train_loss": loss} for e, loss in zip(errors, losses, strict=True)]
        return honest.Row(name, 0.1, 0.1, runs, runs)

    found = [row("uniform", [0.1, 0.11], [0.2, 0.2]), row("good", [0.05, 0.0601], [0.1, 0.1001]),
             row("lost", [0.9, 0.9], [float("nan")] * 2)]  # fmt: skip
    found[2].train_runs[0]["train_loss"] = found[2].train_runs[1]["train_loss"] = None
    said = honest.verdict(found, ours="good")
    assert "test error against uniform: better: good; worse: lost" in said
    assert "train loss against uniform: better: good; worse: lost" in said
    assert "test error against good: better: none; worse: uniform, lost" in said


class Curves:
    """A bench of formulas: the training loss falls with the passes, by method, batch and rate."""

    problem = contest.Problem("formula", (), 2, 32, *[{"x": np.zeros((1600, 1)), "y": np.zeros(1600, int)}] * 3)

    def __init__(self, speeds: dict[str, float]) -> None:
        self.speeds = speeds

    def run(self, name: str, passes: float, rate: float, seed: int, *, batch_size: int) -> dict[str, float]:
        epochs = passes / self.problem.num_examples * self.speeds[name] * (1 + 0.01 * seed % 1)
        fit = abs(np.log10(rate / 0.3)) + abs(np.log2(batch_size / 64)) / 20
        loss = float(np.exp(-0.3 * epochs * np.exp(-fit)))
        errors = dict.fromkeys(("test_error", "test_worst_class", "test_calibration", "top_share"), loss)
        return {"train_loss": loss, "passes": passes, "steps": passes / batch_size, "seconds": passes,
                "core_seconds": passes} | errors  # fmt: skip


def test_a_race_tunes_alike_arrives_between_rungs_and_names_the_fastest_by_the_interval() -> None:
    runs, scale = Curves({"uniform": 1.0, "quick": 2.0, "ours": 2.01}), problems.Scale(1600, (), 32, 10)
    arm = race.tune(runs, "uniform", [8, 16], scale)
    assert (arm.batch_size, arm.rate) == (64, 0.3)  # both grids went on beyond their best edges
    assert [f"batch {size}" in line for size, line in zip((8, 16, 64), arm.tried, strict=True)] == [True] * 3
    assert " 1: " in arm.tried[-1]
    assert race.batch_ladder([32, 128], 18_000) == ((8, 32, 128, 512), (1, 3))
    with pytest.raises(ValueError, match="at most 100 for 1,600 examples, got 128"):
        race.batch_ladder([32, 128], 1600)
    finishes = {
        name: [race.shortest(runs, name, 32, 0.3, seed, scale, rung=3) for seed in range(3)] for name in runs.speeds
    }
    epochs = finishes["uniform"][0].passes / 1600
    assert epochs == pytest.approx(-np.log(0.05) / 0.3 * np.exp(0.05), rel=5e-3)
    assert race.shortest(runs, "uniform", 32, 1e-9, 0, scale) == race.NEVER
    just = finishes["uniform"][0].passes
    assert race.shortest(runs, "uniform", 32, 0.3, 0, scale, most_passes=just) == finishes["uniform"][0]
    assert race.shortest(runs, "uniform", 32, 0.3, 0, scale, most_passes=just / race.RUNG) == race.NEVER
    assert race.fastest(finishes, "passes").startswith("passes: fastest: ours, 1.00 [1.00, 1.00] of quick's")
    assert race.against_best(finishes, "passes")[0].endswith("ahead")
    noisy = {name: [f._replace(passes=f.passes * (1 + 0.1 * seed * (name == "ours"))) for seed, f in enumerate(found)]
             for name, found in finishes.items()}  # fmt: skip
    assert "no method is shown" in race.fastest(noisy, "passes")
    assert race.against_best(noisy, "passes")[0].endswith("a tie")
    assert "3/3" in race.table([arm], finishes)


def test_runs_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"key": ["a", "uniform", 1.0, 0.1, 0], "found": {}}\n')
    with pytest.raises(ValueError, match="move the file away"):
        bench.Results(tmp_path / "runs.jsonl")


@pytest.mark.slow
def test_the_papers_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--dataset", "digits", "--scale", "tiny", "--seeds", "1", "--settings", "1", "--folder", str(tmp_path)]
    command += ["--arms", "uniform", "ours"]
    paper.main([*command, "--data-dir", str(tmp_path / "data")])
    printed = capsys.readouterr().out
    assert "train error 0.02" in printed
    assert "ours: STALE/UNIFORM after train loss 0.3" in printed
    folder = tmp_path / "digits-tiny-setting-1"
    assert {"loss.png", "error.png", "variance.png"} <= {path.name for path in folder.iterdir()}
    lines = list(paper.compare.read(folder).curves["ours"][0])
    whole = [line for line in lines if "full_ratio" in line]
    assert [line["step"] for line in whole] == [0, 40]
    for line in whole:
        assert line["full_sd_ideal"] <= line["full_sd_uniform"] * 1.0001
        assert line["full_sd_ideal"] <= line["full_sd_stale"] * 1.0001


@pytest.mark.slow
def test_the_papers_variances_are_those_of_all_examples(problem: contest.Problem) -> None:
    # Against the definition: the gradients of all examples, stacked.
    params = problem.init(jax.random.key(0))
    norms, mean = paper.isgd.norms_and_mean_gradient(problem.loss_fn, params, problem.train, batch_size=paper.SLICE)
    square = optax.tree.norm(mean, squared=True)
    grads = jax.jit(paper.isgd.stacked_per_example_grads(problem.loss_fn))(params, problem.train)
    flat = jnp.concatenate([leaf.reshape(SIZE, -1) for leaf in jax.tree.leaves(grads)], axis=1)
    np.testing.assert_allclose(norms, jnp.linalg.norm(flat, axis=1), rtol=1e-4)
    np.testing.assert_allclose(square, jnp.sum(jnp.square(jnp.mean(flat, axis=0))), rtol=1e-4)
    found = paper.spreads(norms, square, {"stale": norms})
    assert found["full_sd_stale"] == pytest.approx(found["full_sd_ideal"], rel=1e-4)


@pytest.mark.parametrize("name", ["uniform", "pilots", "ours", "skip"])
def test_ways_to_share_out_rollouts_are_unbiased_but_for_skipping(name: str) -> None:
    # 4,000 steps at one memory, within 5 standard errors of 1/N for each prompt; of skipping, many prompts are not.
    bandit = prompts.Problem(jnp.zeros((SIZE, 64)), jnp.zeros(SIZE, jnp.int32), jnp.zeros(SIZE))
    arm, worth = (
        prompts.ARMS[name][0](bandit, prompts.ARMS[name][1][1]),
        jnp.arange(SIZE, dtype=jnp.float32) % 7.0 + 0.1,
    )
    memory = arm.init()
    if name == "ours":
        memory = memory._replace(scores=worth, version=jnp.zeros(SIZE, jnp.int32))
    if name == "skip":
        memory = memory._replace(alike=worth)

    def pilot(key: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.random.bernoulli(key, 0.5, indices.shape).astype(jnp.float32), worth[indices]

    def step(key: jax.Array) -> jax.Array:
        chosen = arm.choose(key, memory, jnp.int32(0), pilot)[0]
        return jnp.zeros(SIZE).at[chosen.indices].add(chosen.weights)

    found = jax.jit(jax.vmap(step))(jax.random.split(jax.random.key(0), 4_000))
    off = jnp.abs(found.mean(axis=0) - 1 / SIZE) > 5 * found.std(axis=0) / np.sqrt(4_000) + 1e-6
    assert int(off.sum()) > SIZE // 2 if name == "skip" else not off.any()


def test_a_return_is_reached_where_the_mean_of_five_looks_is() -> None:
    curve = [0.0, 1.0, 0.0, *[0.95] * 5, 0.0]
    assert prompts.arrival(curve, 0.9) == 8 * prompts.LOOK_EVERY * prompts.ROLLOUTS
    assert prompts.arrival(curve, 0.96) == prompts.arrival(curve[:4], 0.5) == float("inf")


def test_chunks_hold_each_drawn_sequence_once_and_padding_counts() -> None:
    data = lengths.Corpus((), np.array([0, 1, 5, 5, 2]), np.arange(5), np.array([16, 20, 400, 512, 33]))
    indices = np.array([4, 0, 2, 0, 3, 1, 2])
    made = list(lengths.chunks(data, indices))
    assert [place for place, _ in made] == [0, 1, 2, 5, 5, 5]
    assert all((data.where[indices[positions]] == place).all() for place, positions in made)
    np.testing.assert_array_equal(np.sort(np.concatenate([positions for _, positions in made])), np.arange(7))
    assert lengths.tokens_computed(data, indices) == 3 * 256 + 3 * 512


@pytest.mark.slow
def test_every_experiment_can_be_imported() -> None:
    folder = Path(paper.__file__).parent
    scripts = [path for path in sorted(folder.rglob("*.py")) if path.name != "norms_torch.py"]
    code = f"import runpy, sys; sys.path[:0] = [{str(folder)!r}, {str(folder / 'benchmarks')!r}]\n" + "\n".join(
        f"runpy.run_path({str(path)!r}, run_name='imported')" for path in scripts
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_the_batch_of_a_loss_is_read_off_a_line_through_logarithms() -> None:
    losses = [3.0 * batch**-0.5 for batch in (100, 150, 225)]
    assert equivalent_batch.interpolated(3.0 * 180**-0.5, [100, 150, 225], losses) == pytest.approx(180)
