"""One thing changed at a time: what does each part of importance sampling contribute?

Every arm is the library's default with one option changed, against epoch-shuffled SGD with the same model, optimiser,
rate and first parameters. Two things are told: the updates (and seconds, scoring included) to a full-set train loss of
0.05 over those of uniform draws, with 95 % intervals over seeds, and the median of Tr Cov STALE/UNIFORM over the
checkpoints with a train loss below 0.3: exact, of one draw from the law in use, so blind to what a sampler adds to it.

Commands: python experiments/ablations.py                           (Fashion-MNIST, 9,500 examples, three seeds)
          python experiments/ablations.py --groups sampler order    (a part of it)
It goes on where it was stopped. Time: an hour on one core, and two more for the group `model`.

Results (JAX 0.10.2, three seeds, shared cores: seconds were too noisy to tell). Updates to train loss 0.05 over those
of uniform draws [95 %], and STALE/UNIFORM; the default is 0.35 [0.28, 0.44] and 0.27 wherever it appears:

    sampler              updates            ratio      proposal         updates            ratio
    independent          0.42 [0.29, 0.61]  0.38       calibrated       0.35 [0.27, 0.45]  0.27
    stratified           0.35 [0.28, 0.44]  0.27       as scored        0.57 [0.39, 0.83]  0.33
    systematic           0.34 [0.28, 0.41]  0.27       additive 0.1     never, see below
    without_replacement  0.34 [0.28, 0.41]  0.27       additive 1       0.65 [0.53, 0.80]  0.31
                                                       additive 10      0.66 [0.41, 1.05]  0.49
    order                                              mixture
    index                0.38 [0.30, 0.48]  0.31       0.03             0.35 [0.28, 0.44]  0.28
    label                0.41 [0.23, 0.73]  0.31       0.1              0.40 [0.19, 0.83]  0.33
    score                0.39 [0.27, 0.56]  0.36       0.3              0.38 [0.30, 0.48]  0.37
    label-score          0.37 [0.30, 0.46]  0.29       0.5              0.45 [0.37, 0.55]  0.46
    cells                0.35 [0.28, 0.44]  0.27
                                                       refresh period
    scorer                                             1                0.29 [0.23, 0.36]  0.22
    loss                 0.37 [0.29, 0.46]  0.36       10               0.31 [0.23, 0.42]  0.24
    logit_bound          0.36 [0.34, 0.39]  0.31       100              0.35 [0.28, 0.44]  0.27
                                                       1,000            0.57 [0.51, 0.65]  0.99
    optimizer                                          5,000            1.09 [1.00, 1.20]  0.98
    sgd                  0.50 [0.20, 1.29]  0.46
    adam                 0.39 [0.24, 0.62]  0.43       momentum, the rate with it
    adamw                0.42 [0.30, 0.59]  0.38       0.5              0.55 [0.31, 0.96]  0.51
                                                       0.9              0.43 [0.23, 0.82]  0.34
    refresh period, as scored
    10                   0.31 [0.26, 0.38]  0.21
    100                  0.57 [0.39, 0.83]  0.33
    1,000                1.64 [1.37, inf]   1.35
    5,000                1.08 [1.00, 1.17]  1.02

    sampler poisson      0.95 [0.66, 1.36]  0.44       (measured with version 0.1; the option is gone)
    power 0.5            0.37 [0.31, 0.43]  0.34       (measured with version 0.1; the option is gone)

The models were run with one seed (seven minutes a run on one core): the CNN came to 0.05 after 650 updates, with
uniform draws after 1,500; the small transformer after 3,850, with uniform draws it had 0.09 after all 6,000.

The default's share of uniform draws was chosen from 0.03 on when this was run; it is at least 0.2 since, for its
weights (`benchmarks/largest_weight.py`). Draws were independent from step to step; they are spread evenly since.

Calibrated scores matter most where scores are old: 1,000 updates old as they are, they do harm (1.64), calibrated they
still help (0.57); fresh ones need no calibration. Poisson's batches hold 31 draws in the room of 64, so an update
of it is half an update. With a small constant in place of a mixture weights have no bound: one run diverged, and two
never learnt.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import paper

from isgd_jax.app import compare, data
from isgd_jax.app.config import Config, configure
from isgd_jax.app.data import Dataset

LEVELS = compare.levels("train_loss=0.05")
Changes = dict[str, Any]


class Scale(NamedTuple):
    """The size of an experiment."""

    examples: int
    hidden: tuple[int, ...]
    batch_size: int
    steps: int
    log_every: int
    variance_every: int


SCALES = {
    ("digits", "tiny"): Scale(300, (8,), 16, 40, 20, 20),
    ("fashion_mnist", "tiny"): Scale(600, (8,), 16, 40, 20, 20),
    ("fashion_mnist", "small"): Scale(10_000, (128, 128), 64, 6_000, 50, 500),
    ("fashion_mnist", "full"): Scale(60_000, (512,) * 4, 128, 20_000, 100, 1_000),
}

RAW: Changes = {"calibrate": "off", "gate": "off", "mixture": 0.1}
"""The scores themselves, as they are."""

GROUPS: dict[str, dict[str, Changes]] = {
    "sampler": {name: {"sampler": name} for name in ("independent", "stratified", "systematic", "without_replacement")},
    "order": {name: {"order": name} for name in ("index", "label", "score", "label-score", "cells")},
    "proposal": {
        "calibrated, gated": {},
        "calibrated": {"gate": "off"},
        "as scored": RAW,
        "additive 0.1": RAW | {"additive": 0.1, "mixture": 1e-6},
        "additive 1": RAW | {"additive": 1.0, "mixture": 1e-6},
        "additive 10": RAW | {"additive": 10.0, "mixture": 1e-6},
    },
    "mixture": {str(share): {"mixture": share} for share in ("auto", 0.03, 0.1, 0.3, 0.5)},
    "refresh period": {str(period): {"refresh_every": period} for period in (1, 10, 100, 1_000, 5_000)},
    "refresh period, as scored": {str(period): RAW | {"refresh_every": period} for period in (10, 100, 1_000, 5_000)},
    "scorer": {name: {"scorer": name} for name in ("grad_norm", "loss", "logit_bound")},
    "momentum": {
        str(momentum): {"momentum": momentum, "learning_rate": round(0.2 * (1 - momentum), 4)}
        for momentum in (0.0, 0.5, 0.9, 0.95)
    },
    "optimizer": {
        "nesterov": {},
        "sgd": {"optimizer": "sgd", "learning_rate": 0.2},
        "adam": {"optimizer": "adam", "learning_rate": 0.001},
        "adamw": {"optimizer": "adamw", "learning_rate": 0.001, "weight_decay": 0.01},
    },
    "model": {"mlp": {}, "cnn": {"model": "cnn"}, "transformer": {"model": "small_transformer:factory"}},
}
KEPT_BY_UNIFORM = ("model", "optimizer", "learning_rate", "momentum", "weight_decay")


class Pair(NamedTuple):
    """An arm and the uniform arm that it is compared to, by their names in the study."""

    group: str
    label: str
    arm: str
    base: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then print a table for each group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=sorted({name for name, _ in SCALES}), default="fashion_mnist")
    parser.add_argument("--scale", choices=("tiny", "small", "full"), default="small")
    parser.add_argument("--groups", nargs="+", choices=tuple(GROUPS), default=list(GROUPS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--data-dir", default=None)
    options = parser.parse_args(arguments)
    if (options.dataset, options.scale) not in SCALES:
        parser.error(f"no scale {options.scale} for {options.dataset}; there are {', '.join(map(' '.join, SCALES))}")
    folder = options.folder / f"{options.dataset}-{options.scale}"
    if jax.config.jax_compilation_cache_dir is None:  # runs share their programs
        jax.config.update("jax_compilation_cache_dir", str(options.folder / "compiled"))
    scale = SCALES[options.dataset, options.scale]
    dataset = paper.shortened(data.load(options.dataset, data_dir=options.data_dir), scale.examples)
    for group in options.groups:
        arms, pairs = arms_of(group, dataset, scale)
        study = compare.train(arms, seeds=options.seeds, folder=folder, levels=LEVELS, say=lambda text: None)
        print(f"\n{group}\n{table(study, pairs)}", flush=True)


def arms_of(group: str, dataset: Dataset, scale: Scale) -> tuple[dict[str, compare.Arm], list[Pair]]:
    """The arms of a group with the uniform arms they need, each under a name that tells what it is."""
    arms, pairs = {}, []
    for label, changes in GROUPS[group].items():
        plain = {name: value for name, value in changes.items() if name in KEPT_BY_UNIFORM}
        names = []
        for these in (plain | {"mode": "uniform"}, changes):
            config = configuration(dataset, scale, these)
            measure = functools.partial(paper.fit, dataset=dataset, variance_every=scale.variance_every)
            names.append(_name(these))
            arms[names[-1]] = compare.Arm(config, measure)
        base, arm = names
        pairs.append(Pair(group, label, arm, base))
    return arms, pairs


def configuration(dataset: Dataset, scale: Scale, changes: Changes) -> Config:
    """The default of the library at this scale, with something changed."""
    common: Changes = {
        "dataset": dataset.name, "hidden": scale.hidden, "batch_size": scale.batch_size, "momentum": 0.95,
        "learning_rate": 0.01, "steps": scale.steps, "log_every": scale.log_every, "checkpoint_every": scale.steps,
        "full_train_loss": True, "monitor": "off",
    }  # fmt: skip
    return configure(**common | changes)


def _name(changes: Changes) -> str:
    """A folder's name: the changes, or what they are changed from."""
    told = ", ".join(f"{name} {value}" for name, value in sorted(changes.items()))
    return told.replace(":", ".") or "default"


def table(study: compare.Study, pairs: Sequence[Pair]) -> str:
    """A line an arm: updates and seconds to the level over uniform's, and STALE/UNIFORM."""
    lines = [("arm", "updates over uniform's [95 %]", "seconds over uniform's [95 %]", "STALE/UNIFORM", "seeds there")]
    for pair in pairs:
        alone = compare.Study({name: study.curves[name] for name in (pair.base, pair.arm)})
        updates, seconds = (row for row in compare.rows(alone, LEVELS) if row.arm == pair.arm)
        ratios = [line["full_ratio"] for curve in study.curves[pair.arm].values() for line in paper.settled(curve)
                  if "full_ratio" in line]  # fmt: skip
        worth = f"{np.median(ratios):.2f}" if ratios else "-"
        spans = (_span(row.ratio) for row in (updates, seconds))
        lines.append((pair.label, *spans, worth, f"{updates.reached}/{updates.seeds}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _span(ratio: compare.Interval) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*ratio)


if __name__ == "__main__":
    main()
