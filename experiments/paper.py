"""The paper's experiment: how many updates importance sampling saves, and what its proposal is worth on the way.

Alain et al. 2015 (arXiv 1511.06481) trained an MLP 3072-2048x4-10 on SVHN with one trainer and three workers. Setting
1: rate 0.01, constant 10 added to every score; setting 2: rate 0.001, constant 1. Nesterov momentum 0.95, batches of
128, proposal refreshed every 32 updates. Their single runs: train accuracy 0.95 and 0.98 after 0.46 and 0.39 of the
updates of uniform draws. ``--scale full --dataset svhn_cropped`` is that, with the scoring done between the updates;
the small scales are for machines without SVHN or an accelerator, and start as He et al. do: N(0, 0.01^2) suits wide
layers only.

Arms   uniform   epoch-shuffled SGD, which is a little better than the draws with replacement of the paper
       paper     independent draws, score + c; a share of all scores is renewed at each refresh, the rest is stale
       ours      the library's proposal on the same scores, stratified draws

Command  python experiments/paper.py --dataset fashion_mnist --scale small --seeds 5
         It goes on where it was stopped; figures go to the folder of the study (``--folder``, default runs/paper).

Time     about a minute and a half a run on one core (small, setting 1), four to eight in setting 2

Results (JAX 0.10.2, one core of two, the other in use, scale small, five seeds). Fashion-MNIST, 19,000 examples,
setting 1:

    train error 0.05  uniform  1,500 updates [1,300, 1,700]  1.00 [1.00, 1.00]    4.7 seconds  1.00
    train error 0.05  paper    900 updates [800, 1,000]      0.59 [0.47, 0.75]    4.2 seconds  0.86 [0.67, 1.09]
    train error 0.05  ours     700 updates [600, 900]        0.48 [0.42, 0.56]    3.5 seconds  0.76 [0.65, 0.88]
    train error 0.02  uniform  3,300 updates [3,100, 3,700]  1.00 [1.00, 1.00]   10.7 seconds  1.00
    train error 0.02  paper    2,300 updates [2,000, 2,600]  0.69 [0.63, 0.76]   10.8 seconds  0.99 [0.93, 1.06]
    train error 0.02  ours     1,100 updates [1,000, 1,400]  0.34 [0.27, 0.42]    5.4 seconds  0.53 [0.43, 0.66]

    STALE/UNIFORM after train loss 0.3, median [quartiles], and the share of checkpoints above 1
    paper  0.75 [0.67, 0.82]   0 % of 60
    ours   0.12 [0.11, 0.28]   0 % of 60

The aim was 0.65 of the updates and a median ratio below 0.6, never above 1: `ours` meets all three, and the 0.39 of the
paper's single run to the second, with 0.48 where it had 0.46 to the first. After all 6,000 updates its train loss is
0.0002, that of uniform draws 0.028; test loss and test error are no better. The paper's constant 10 is safe and, once
norms are small, nearly uniform. Half the seconds are saved although one device does the scoring too, a sixth of all
examples every 32 updates. (With a line along cells of gradients, which was the default, updates were 0.42 [0.35, 0.51]
and 0.34 [0.30, 0.38], seconds 1.13 [0.95, 1.34] and 0.89 [0.80, 0.99]; so with draws independent from step to step 0.41
[0.36, 0.46] and 0.38 [0.34, 0.43] of the updates.)

Setting 2, a tenth of the rate (five seeds, version 0.2): the variance falls as much as in setting 1, but at this rate
there is less noise for it to take away, and seconds are lost:

    train error 0.05  uniform  2,700 updates [2,600, 2,900]  1.00 [1.00, 1.00]    8.3 seconds
    train error 0.05  paper    2,400 updates [2,200, 2,400]  0.85 [0.83, 0.88]   10.9 seconds
    train error 0.05  ours     2,300 updates [2,200, 2,400]  0.83 [0.81, 0.85]   19.1 seconds
    train error 0.02  uniform  4,400 updates [4,300, 4,500]  1.00 [1.00, 1.00]   14.1 seconds
    train error 0.02  paper    3,500 updates [3,400, 3,600]  0.79 [0.77, 0.81]   15.8 seconds
    train error 0.02  ours     3,500 updates [3,300, 3,500]  0.78 [0.75, 0.81]   28.1 seconds

    STALE/UNIFORM after train loss 0.3, median [quartiles], and the share of checkpoints above 1
    paper  0.21 [0.16, 0.25]   0 % of 240
    ours   0.14 [0.14, 0.15]   0 % of 240

Setting 2 and what follows were measured with draws independent from step to step, and a line along cells; those of ours
are spread evenly since, along labels and scores.

Digits, 1,365 examples: setting 1 to train error 0.02: paper 0.79 [0.64, 0.98]; setting 2: 1.00 [0.95, 1.05]. There
is little to gain in four epochs.
"""

import argparse
import functools
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import isgd_jax as isgd
from isgd_jax.app import compare, data, evaluation, figures, run, task
from isgd_jax.app.config import Config, configure
from isgd_jax.app.data import Dataset
from isgd_jax.app.records import Record
from isgd_jax.sampling import proposal, samplers
from isgd_jax.training.train_step import TrainState
from isgd_jax.variance import second_moments

LEVELS = compare.levels("train_error=0.05,0.02")
"""Train accuracy 0.95 and 0.98."""
CONSTANTS = (0.1, 1.0, 10.0)
"""Constants added to the scores, of which the variance is drawn."""
SETTLED = 0.3
"""Train loss from which on the ratio STALE/UNIFORM is judged: before it nearly all norms are alike."""
HELD_OUT = 0.05
ARMS = ("uniform", "paper", "ours")
SLICE = 1024


class Setting(NamedTuple):
    """What the two experiments of the paper differ in."""

    learning_rate: float
    additive: float


SETTINGS = {1: Setting(0.01, 10.0), 2: Setting(0.001, 1.0)}


class Scale(NamedTuple):
    """How much of the experiment to make."""

    examples: int
    hidden: tuple[int, ...]
    initializer: str
    batch_size: int
    steps: dict[int, int]
    """Updates, by setting."""
    refresh_share: float
    log_every: int
    variance_every: int


SCALES = {
    ("digits", "tiny"): Scale(500, (16, 16), "he", 32, {1: 60, 2: 60}, 0.5, 20, 40),
    ("digits", "small"): Scale(1_437, (64, 64, 64, 64), "he", 32, {1: 1_500, 2: 6_000}, 0.32, 25, 100),
    ("fashion_mnist", "tiny"): Scale(1_000, (16, 16), "he", 32, {1: 60, 2: 60}, 0.5, 20, 40),
    ("fashion_mnist", "small"): Scale(20_000, (256,) * 4, "he", 128, {1: 6_000, 2: 24_000}, 0.16, 100, 500),
    ("fashion_mnist", "full"): Scale(60_000, (512,) * 4, "he", 128, {1: 15_000, 2: 100_000}, 0.16, 100, 500),
    ("svhn_cropped", "full"): Scale(604_388, (2048,) * 4, "paper", 128, {1: 60_000, 2: 400_000}, 0.02, 500, 5_000),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=sorted({name for name, _ in SCALES}), default="fashion_mnist")
    parser.add_argument("--scale", choices=("tiny", "small", "full"), default="small")
    parser.add_argument("--settings", type=int, nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/paper"))
    parser.add_argument("--copy-to", type=Path, help="put the figure of the losses there too, as paper-loss.png")
    parser.add_argument("--data-dir", default=None)
    options = parser.parse_args(arguments)
    if (options.dataset, options.scale) not in SCALES:
        parser.error(f"no scale {options.scale} for {options.dataset}; there are {', '.join(map(' '.join, SCALES))}")
    scale = SCALES[options.dataset, options.scale]
    dataset = shortened(data.load(options.dataset, data_dir=options.data_dir), scale.examples)
    for number in options.settings:
        folder = options.folder / f"{options.dataset}-{options.scale}-setting-{number}"
        chosen = {name: arm for name, arm in arms(dataset, scale, number).items() if name in options.arms}
        study = compare.train(chosen, seeds=options.seeds, folder=folder, say=_say)
        print(f"\n{dataset.name}, {len(dataset):,} examples, setting {number} {SETTINGS[number]}")
        print(compare.text(compare.rows(study, LEVELS)), worth(study), sep="\n", flush=True)
        for path in draw(study, folder):
            print(f"figure: {path}")
        if options.copy_to is not None:
            shutil.copy(folder / "loss.png", options.copy_to / "paper-loss.png")


def shortened(dataset: Dataset, examples: int) -> Dataset:
    """At most so many training examples; a twentieth of them is held out as the paper did, unless the set comes so."""
    order = np.random.default_rng(0).permutation(len(dataset))[:examples]
    train_split = {name: values[order] for name, values in dataset.train.items()}
    valid = dataset.valid
    if valid is None:
        cut = round(HELD_OUT * len(order))
        valid = {name: values[:cut] for name, values in train_split.items()}
        train_split = {name: values[cut:] for name, values in train_split.items()}
    return data.from_arrays(
        train_split,
        dataset.test,
        valid=valid,
        name=dataset.name,
        num_classes=dataset.num_classes,
        input_key=dataset.input_key,
        per_coordinate=dataset.statistics[dataset.input_key].mean.ndim > 0,
    )


def arms(dataset: Dataset, scale: Scale, number: int) -> dict[str, compare.Arm]:
    """The arms of a setting; the first is what the others are compared to."""
    setting = SETTINGS[number]
    steps = scale.steps[number]
    common: dict[str, Any] = {
        "dataset": dataset.name, "hidden": scale.hidden, "initializer": scale.initializer, "momentum": 0.95,
        "learning_rate": setting.learning_rate, "batch_size": scale.batch_size, "steps": steps,
        "log_every": scale.log_every, "checkpoint_every": max(1, steps // 4), "full_train_loss": True,
    }  # fmt: skip
    scored = common | {"mode": "relaxed", "refresh_every": 32, "refresh_share": scale.refresh_share}
    configs = {
        "uniform": configure(**common, mode="uniform", sampler="shuffled"),
        "paper": configure(
            **scored,
            sampler="independent",
            order="index",
            calibrate="off",
            gate="off",
            additive=setting.additive,
            mixture=1e-6,
        ),
        "ours": configure(**scored, sampler="stratified"),
    }
    return {
        name: compare.Arm(config, functools.partial(fit, dataset=dataset, variance_every=scale.variance_every))
        for name, config in configs.items()
    }


def fit(config: Config, /, *, dataset: Dataset, variance_every: int, **options: Any) -> run.Result:
    """`isgd_jax.app.run.fit` on our data, with more measured at each line of progress."""
    return run.fit(config, dataset=dataset, measure=measuring(config, dataset, variance_every), **options)


Measure = Callable[[TrainState], Record]


def measuring(config: Config, dataset: Dataset, variance_every: int) -> Measure:
    """Build ``measure(state)``: fit on the validation split, and now and then √Tr Cov over all examples.

    ``full_sd_uniform``, ``full_sd_ideal``, ``full_sd_stale`` of the law drawn from, and ``full_sd_stale_<c>`` of the
    scores in the table with the constant c added; ``full_ratio`` is Tr Cov STALE over UNIFORM. Exact, not estimated.
    """
    work = task.make(config.model, dataset)
    fitness = evaluation.make_evaluate(work)
    valid, train_data = jax.device_put((dict(dataset.valid or {}), dict(work.train)))

    def measure(state: TrainState) -> Record:
        found = fitness(state.params, valid)
        measured = {"valid_loss": float(found.loss), "valid_error": float(found.error)}
        known = state.sampler
        if int(known.clock.step) % variance_every:
            return measured
        norms, mean = isgd.norms_and_mean_gradient(work.loss_fn, state.params, train_data, batch_size=SLICE)
        square = optax.tree.norm(mean, squared=True)
        laws = {"stale": samplers.probabilities(known.proposal.law)}
        trusted = proposal.trust(known.table, version=known.version)
        if bool(trusted.any()):
            scores = proposal.fill_untrusted(known.table.scores, trusted)
            laws |= {f"stale_{constant:g}": scores + constant for constant in CONSTANTS}
        return measured | spreads(norms, square, laws)

    return measure


def spreads(norms: Array, square: Array, laws: dict[str, Array]) -> Record:
    """√Tr Cov of one draw: uniform, ideal, and under each law; and the ratio of the first law to uniform."""
    traces = {
        name: second_moments.trace_covariance(second_moments.moments(norms, law), square) for name, law in laws.items()
    }
    first = next(iter(traces.values()))
    values = {"uniform": first.uniform, "ideal": first.ideal} | {name: trace.stale for name, trace in traces.items()}
    spread = {f"full_sd_{name}": float(jnp.sqrt(jnp.maximum(value, 0.0))) for name, value in values.items()}
    return spread | {"full_ratio": float(first.stale / first.uniform)}


def worth(study: compare.Study) -> str:
    """STALE/UNIFORM of each arm that scores: its median once settled, and the share of checkpoints above 1."""
    lines = []
    for name in list(study.curves)[1:]:
        curves = study.curves[name].values()
        late = [line["full_ratio"] for curve in curves for line in settled(curve) if "full_ratio" in line]
        every = [line["full_ratio"] for curve in curves for line in curve if line["step"] and "full_ratio" in line]
        if late:
            low, middle, high = np.quantile(late, [0.25, 0.5, 0.75])
            text = f"median {middle:.2f} [quartiles {low:.2f}, {high:.2f}] of {len(late)} checkpoints"
        else:
            text = f"no checkpoint below train loss {SETTLED}"
        above = f"above 1 at {np.mean(np.array(every) > 1):.0%} of all {len(every)}" if every else "never measured"
        lines.append(f"{name}: STALE/UNIFORM after train loss {SETTLED}: {text}; {above}")
    return "\n".join(lines)


def settled(curve: Iterable[Record]) -> list[Record]:
    """The lines of a run from the first with train loss at most 0.3."""
    lines = list(curve)
    first = next((i for i, line in enumerate(lines) if line["train_loss"] <= SETTLED), len(lines))
    return lines[first:]


def draw(study: compare.Study, folder: Path) -> list[Path]:
    """loss.png and error.png against updates and hours, and variance.png."""
    with figures.style():
        drawn = {kind: _fits(study, kind) for kind in ("loss", "error")} | {"variance": _variances(study)}
        paths = []
        for name in [name for name, figure in drawn.items() if figure is not None]:
            paths.append(folder / f"{name}.png")
            paths[-1].write_bytes(figures.png(drawn[name]))
    return paths


def _fits(study: compare.Study, kind: str) -> Any:
    """Medians and quartiles: a column each for the splits, a row for updates and one for hours."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    figure = Figure(figsize=(10.5, 6.2))
    panels = figure.subplots(2, 3, sharex="row")
    splits = {"train": "Training set", "valid": "Validation", "test": "Test"}
    lines = [line for by_seed in study.curves.values() for curve in by_seed.values() for line in curve]
    long = max(line["train_seconds"] for line in lines) > 360
    clock = ("train_seconds", "hours of training" if long else "seconds of training", 3600.0 if long else 1.0)
    for row, (against, label, unit) in enumerate((("step", "updates", 1.0), clock)):
        for axes, (split, title) in zip(panels[row], splits.items(), strict=True):
            for i, (name, by_seed) in enumerate(study.curves.items()):
                band = compare.quartiles(list(by_seed.values()), f"{split}_{kind}", against)
                colour, style = figures.COLOURS[i], figures.STYLES[i]
                axes.plot(band.x / unit, band.middle, label=name, color=colour, linestyle=style)
                axes.fill_between(band.x / unit, band.low, band.high, color=colour, alpha=0.18, linewidth=0)
            axes.set(xlabel=label, title=title if row == 0 else None)
            if kind == "loss":
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if split == "train" else (1.0, 2.0, 4.0, 6.0)))
                axes.yaxis.set_minor_formatter(NullFormatter())
            else:
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
                axes.set_ylim(0, 1.1 * np.quantile([line[f"{split}_error"] for line in lines], 0.9))
    seeds = len(next(iter(study.curves.values())))
    panels[0, 0].set_ylabel(f"{kind}: median and quartiles of {seeds}")
    panels[1, 0].set_ylabel(kind)
    panels[0, 0].legend()
    return figure


def _variances(study: compare.Study) -> Any:
    """√Tr Cov of one draw along the runs of each arm that scores; None where none does."""
    from matplotlib.figure import Figure

    scored = list(study.curves)[1:]
    if not scored:
        return None
    figure = Figure(figsize=(5.4 * len(scored), 4.6))
    curves = {
        "full_sd_uniform": ("uniform", figures.GREY, "--"),
        "full_sd_stale": ("the law drawn from", figures.BLUE, "-"),
    }
    extra = (figures.ORANGE, figures.PINK, figures.BROWN)
    for constant, colour in zip(CONSTANTS, extra, strict=True):
        curves[f"full_sd_stale_{constant:g}"] = (f"stale scores + {constant:g}", colour, "-.")
    curves["full_sd_ideal"] = ("ideal, independent draws", figures.GREEN, ":")
    panels = figure.subplots(1, len(scored), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, scored, strict=True):
        for field, (label, colour, style) in curves.items():
            band = compare.quartiles(list(study.curves[name].values()), field)
            if band is not None:
                axes.plot(band.x, band.middle, label=label, color=colour, linestyle=style)
                axes.fill_between(band.x, band.low, band.high, color=colour, alpha=0.15, linewidth=0)
        axes.set(title=f"Trained by: {name}", xlabel="updates", yscale="log")
    panels[0].set_ylabel("√Tr Cov of one draw, all examples")
    panels[0].legend()
    return figure


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
