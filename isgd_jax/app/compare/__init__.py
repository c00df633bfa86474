"""Arms and seeds compared: who needs how many updates, and how many seconds, to the same level.

An *arm* is a configuration under a name, a *study* is every arm trained from the same seeds, in one folder:

    from isgd_jax.app import compare
    from isgd_jax.app.config import configure

    arms = {"uniform": compare.Arm(configure(mode="uniform")), "exact": compare.Arm(configure(mode="exact"))}
    levels = compare.levels("test_loss=0.2,0.1")
    study = compare.train(arms, seeds=5, folder=Path("runs/mine"), levels=levels)   # goes on where it was stopped
    print(compare.text(compare.rows(study, levels)))
    compare.draw(study, Path("runs/mine"))

Importing this package imports neither jax nor matplotlib; training and drawing do.
"""

from isgd_jax.app.compare.intervals import Interval, geometric_mean, mean, median, paired_ratio
from isgd_jax.app.compare.levels import Level, first_seen, levels
from isgd_jax.app.compare.plots import draw, quartiles
from isgd_jax.app.compare.study import Arm, Curve, Say, Study, group, read, train
from isgd_jax.app.compare.tables import Row, aligned, common_levels, left_out, markdown, rows, text

__all__ = [
    "Arm",
    "Curve",
    "Interval",
    "Level",
    "Row",
    "Say",
    "Study",
    "aligned",
    "common_levels",
    "draw",
    "first_seen",
    "geometric_mean",
    "group",
    "left_out",
    "levels",
    "markdown",
    "mean",
    "median",
    "paired_ratio",
    "quartiles",
    "read",
    "rows",
    "text",
    "train",
]
