"""The Optax chains that the command line offers: the reweighting first, an optimiser behind it."""

import optax

from isgd_jax.app.config import Config
from isgd_jax.reweight import importance_weighting


def make(config: Config, *, num_examples: int, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """The chain of a configuration. Decoupled weight decay stands behind the reweighting: it is no part of it."""
    return optax.chain(importance_weighting(num_examples), behind(config, num_steps=num_steps))


def behind(config: Config, *, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimiser alone: the second part of the chain, for mean gradients."""
    rate: optax.ScalarOrSchedule = config.learning_rate
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(config.learning_rate, num_steps)
    return {
        "sgd": lambda: optax.sgd(rate),
        "nesterov": lambda: optax.sgd(rate, momentum=config.momentum, nesterov=True),
        "adam": lambda: optax.adam(rate),
        "adamw": lambda: optax.adamw(rate, weight_decay=config.weight_decay),
    }[config.optimizer]()
