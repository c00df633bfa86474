"""Configurations with a name: the paper's two settings, to be started as they are or changed flag by flag.

What differs from the paper: an example whose score is too old counts as the mean trusted score, where the paper gave it
no chance (which is a bias); the seconds that a score may be old stand beside the versions it may be old; and held-out
data, which the paper's workers measured beside their scoring, is measured by the trainer.
"""

from isgd_jax.app.config import configure

__all__ = ["PRESETS"]

_PAPER = configure(
    dataset="svhn_cropped",
    hidden=(2048, 2048, 2048, 2048),
    initializer="paper",
    mode="relaxed",
    engine="local",
    sampler="independent",
    order="index",
    calibrate="off",
    gate="off",
    refresh_every=32,
    chunk_size=2048,
    mixture=0.0,
    max_age_seconds=20.0,
    min_trusted=0.1,
    optimizer="nesterov",
    momentum=0.95,
    batch_size=128,
    learning_rate=0.01,
    additive=10.0,
)

PRESETS = {
    "paper-1": _PAPER,
    "paper-2": _PAPER.replace(learning_rate=0.001, additive=1.0),
}
"""The paper, section 5 and its stored settings: 18,903,050 parameters, one trainer, three workers."""
