"""Flags that a run would take no notice of: refused where somebody gave them, and left alone in files of older runs."""

from collections.abc import Iterator

from isgd_jax.app.config import Config
from isgd_jax.app.fields import must

__all__ = ["refuse_ignored"]


def refuse_ignored(config: Config, default: Config) -> None:
    """Refuse a field that was given another value than it has by default, where nothing reads it.

    A configuration itself may have such values, for one set of flags may be shared by runs of several modes.

    Args:
        config: as it was asked for.
        default: what it would be without being asked: the defaults, those of a preset, or what all arms share.

    Raises:
        ValueError: there is such a field; what it needs is said.
    """
    before, now = default.flat(), config.flat()
    for part, name, is_read, needed in _conditions(config):
        must(getattr(config, part), name, is_read or now[name] == before[name], f"left out unless {needed}")


def _conditions(config: Config) -> Iterator[tuple[str, str, bool, str]]:
    """The part and the name of a field, whether it is read, and what it needs to be."""
    mode, is_scored = config.sampling.mode, config.sampling.is_scored
    scored = "mode=exact or mode=relaxed"
    yield "training", "steps", config.training.epochs is None, "epochs=None"
    yield "training", "momentum", config.training.optimizer == "nesterov", "optimizer=nesterov"
    yield "model", "hidden", config.model.model != "cnn", "model=mlp"
    yield "refresh", "refresh_share", mode == "relaxed", "mode=relaxed"
    yield "refresh", "max_age", is_scored, scored
    yield "workers", "engine", is_scored, scored
    yield "workers", "scorers", config.workers.engine == "cluster", "engine=cluster"
    yield "sampling", "mixture", mode != "uniform", "a mode with scores"
    yield "scoring", "scorer", mode not in ("uniform", "static"), f"{scored} or mode=presample"
