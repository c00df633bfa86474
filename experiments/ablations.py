"""One thing changed at a time: what does each part of importance sampling contribute?

Every arm is the library's default with one option changed, against epoch-shuffled SGD with the same model, optimiser,
rate and first parameters. Two things are told: the updates (and seconds, scoring included) to a full-set train loss of
0.05 over those of uniform draws, with 95 % intervals over seeds, and the median of Tr Cov STALE/UNIFORM over the
checkpoints with a train loss below 0.3: exact, of one draw from the law in use, so blind to what a sampler adds to it.

Commands: python experiments/ablations.py                           (Fashion-MNIST, 9,500 examples, three seeds)
          python experiments/ablations.py --groups sampler order    (a part of it)
It goes on where it was stopped. Time: half an hour on one core, and two more for the group `model`.

Results (JAX 0.10.2, three seeds, one core of two, the other in use). Updates and seconds to train loss 0.05 over those
of uniform draws [95 %], and STALE/UNIFORM; the default is 0.32 [0.29, 0.36], 0.61 to 0.68, and 0.29 wherever it
appears:

    changed                       updates            seconds            ratio
    sampler independent           0.39 [0.35, 0.43]  0.82 [0.62, 1.09]  0.33
            stratified            0.32 [0.29, 0.36]  0.61 [0.49, 0.76]  0.29
            systematic            0.32 [0.27, 0.39]  0.62 [0.45, 0.85]  0.28
            without_replacement   0.32 [0.27, 0.39]  0.62 [0.50, 0.77]  0.28
    order   index                 0.35 [0.30, 0.40]  0.75 [0.69, 0.82]  0.32
            label                 0.34 [0.31, 0.37]  0.68 [0.51, 0.92]  0.31
            score                 0.35 [0.30, 0.41]  0.71 [0.48, 1.07]  0.33
            label-score           0.32 [0.29, 0.36]  0.65 [0.50, 0.85]  0.29
            cells                 0.34 [0.25, 0.46]  1.16 [0.96, 1.41]  0.26
    proposal calibrated, ungated  0.32 [0.29, 0.36]  0.59 [0.58, 0.61]  0.28
            as scored             0.46 [0.18, 1.14]  0.84 [0.36, 1.95]  0.27
            additive 0.1          never, see below
            additive 1            0.47 [0.23, 0.95]  0.86 [0.35, 2.12]  0.36
            additive 10           0.61 [0.31, 1.20]  1.03 [0.42, 2.49]  0.49
    mixture 0.03                  0.32 [0.29, 0.36]  0.68 [0.67, 0.70]  0.25
            0.1                   0.31 [0.28, 0.35]  0.62 [0.42, 0.91]  0.29
            0.3                   0.33 [0.30, 0.36]  0.64 [0.43, 0.97]  0.32
            0.5                   0.38 [0.33, 0.43]  0.73 [0.55, 0.98]  0.43
    refresh period 1              0.30 [0.27, 0.33]  19   [14, 25]      0.19
            10                    0.30 [0.26, 0.35]  2.34 [1.89, 2.89]  0.27
            100                   0.32 [0.29, 0.36]  0.63 [0.49, 0.81]  0.29
            1,000                 0.52 [0.42, 0.64]  0.71 [0.47, 1.06]  0.99
            5,000                 1.20 [0.58, 2.47]  1.52 [0.63, 3.68]  1.00
    refresh period, as scored 10  0.30 [0.28, 0.32]  2.33 [1.95, 2.77]  0.28
            100                   0.46 [0.18, 1.14]  0.81 [0.27, 2.40]  0.27
            1,000                 0.60 [0.26, 1.35]  0.71 [0.37, 1.35]  0.95
            5,000                 1.26 [1.11, 1.44]  1.41 [1.06, 1.87]  1.01
    scorer  loss                  0.35 [0.30, 0.40]  0.64 [0.46, 0.89]  0.34
            logit_bound           0.34 [0.31, 0.38]  0.63 [0.46, 0.85]  0.32
    optimizer sgd                 0.56 [0.31, 1.02]  1.22 [0.70, 2.15]  0.44
            adam                  0.38 [0.35, 0.40]  0.70 [0.60, 0.81]  0.39
            adamw                 0.38 [0.33, 0.44]  0.67 [0.62, 0.73]  0.43
    momentum 0, the rate with it  0.56 [0.31, 1.02]  1.18 [0.59, 2.34]  0.44
            0.5                   0.53 [0.30, 0.94]  1.04 [0.61, 1.80]  0.60
            0.9                   0.35 [0.22, 0.56]  0.73 [0.36, 1.47]  0.31

The models were run with one seed, draws independent from step to step and cells (seven minutes a run on one core): the
CNN came to 0.05 after 650 updates, with uniform draws after 1,500; the small transformer after 3,850, with uniform
draws it had 0.09 after all 6,000.

Cells take no fewer updates and nearly twice the seconds: they were the default until this was run. With a small
constant in place of a mixture weights have no bound, and no run came to the loss.
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
    return compare.aligned(lines)


def _span(ratio: compare.Interval) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*ratio)


if __name__ == "__main__":
    main()
