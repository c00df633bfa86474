"""The Optax chains that the command line offers: the reweighting first, an optimizer behind it."""

import optax

from isgd_jax.app.config import TrainingConfig
from isgd_jax.reweight import importance_weighting

__all__ = ["behind", "make"]


def make(training: TrainingConfig, num_examples: int) -> optax.GradientTransformationExtraArgs:
    """The chain of a configuration, for the per-example gradients of draws from ``num_examples``.

    Decoupled weight decay (Loshchilov and Hutter 2019) stands behind the reweighting: it is no part of it.

    Args:
        training: optimizer, rate, schedule.
        num_examples: of the training set: the 1/N of the reweighting, and what an epoch is.

    Returns:
        The chain, whose state is the pair of the reweighting's and the optimizer's.
    """
    return optax.chain(importance_weighting(num_examples), behind(training, num_examples))


def behind(training: TrainingConfig, num_examples: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer alone: the second part of the chain, for mean gradients.

    Args:
        training: optimizer, rate, schedule.
        num_examples: of the training set. A rate that decays does so over the updates to be made on it: then a run that
            is resumed cannot be made longer.
    """
    rate: optax.ScalarOrSchedule = training.learning_rate
    if training.schedule == "cosine":
        rate = optax.cosine_decay_schedule(training.learning_rate, training.num_steps(num_examples))
    return {
        "sgd": lambda: optax.sgd(rate),
        "nesterov": lambda: optax.sgd(rate, momentum=training.momentum, nesterov=True),
        "adam": lambda: optax.adam(rate),
        "adamw": lambda: optax.adamw(rate, weight_decay=training.weight_decay),
    }[training.optimizer]()
