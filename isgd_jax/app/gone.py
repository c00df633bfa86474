"""Flags of earlier versions: what the command says of them, and what becomes of their values in old runs."""

from collections.abc import Sequence
from typing import Any

from isgd_jax.errors import ArgumentError

__all__ = ["GONE", "IN_PYTHON", "refuse_gone", "without_gone"]

GONE = {
    "coin": "--coin went in 0.2: every step draws from the proposal; use --mixture for a share of uniform draws",
    "held_out_by": "--held-out-by went in 0.2: leave it out; the trainer measures held-out data, every --log-every "
    "steps",
    "power": "--power went in 0.2: proposals are made of the scores themselves; raise --mixture to trust them less",
    "priorities": "--priorities went in 0.2: leave it out; workers score the training set alone",
    "probe_every": "--probe-every went in 0.2: leave it out; --monitor on (the default) estimates the same from the "
    "draws of training",
    "probe_size": "--probe-size went in 0.2: leave it out; --monitor on (the default) draws no examples of its own",
    "refresh_when": "--refresh-when went in 0.2: scores are refreshed every --refresh-every steps; raise that where "
    "scoring takes more time than it gains",
    "rescore": "--rescore went in 0.2: chunks are scored in turn, as it was by default; leave it out",
    "sampler poisson": "--sampler poisson went in 0.2: use stratified (the default) or independent; a loop of your own "
    "can draw with samplers.poisson",
}
"""Options of earlier versions, and values of options (`name value`), with what to do instead."""

_UNCHOSEN: dict[str, Any] = {
    "coin": 1.0,
    "held_out_by": "trainer",
    "power": 1.0,
    "probe_every": None,
    "refresh_when": "always",
    "rescore": "turn",
}
"""What options that went were unless chosen. Runs that have it are as runs are now, and are still read. The size of
something that went along with it (`priorities`, `probe_size`) decided nothing by itself, and is not asked for."""

IN_PYTHON = (
    "additive", "calibrate", "candidates", "chunk_patience", "gate", "heartbeat_timeout", "initialization_timeout",
    "initializer", "max_age_seconds", "min_trusted", "order", "publish_every", "refetch_every", "score_budget",
    "score_memory",
)  # fmt: skip
"""Fields of the configuration that had flags once: runs have them as before, and Python sets them."""


def refuse_gone(arguments: Sequence[str]) -> None:
    """Refuse flags of earlier versions, as ``--name value`` and as ``--name=value``.

    Raises:
        ValueError: one of the arguments is in `GONE` or `IN_PYTHON`; it says what to do instead.
    """
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, _, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        for key in (name, f"{name} {value or following}"):
            if flag.startswith("--") and key in GONE:
                raise ArgumentError(GONE[key])
        if flag.startswith("--") and name in IN_PYTHON:
            raise ArgumentError(
                f"--{name.replace('_', '-')} went in 0.2: few tuned it; in Python {name} is set as before, by "
                f"isgd_jax.app.run.fit(configure({name}=...))"
            )


def without_gone(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a run of any version, without those of options that went and had not been chosen.

    Args:
        values: of a flat configuration, as 0.1 wrote it.

    Raises:
        ValueError: one of them had been chosen: the run cannot be gone on with as it was, and is not read as if it
            could.
    """
    for name, value in values.items():
        if name in GONE and value != _UNCHOSEN.get(name, value):
            raise ArgumentError(GONE[name])
        if f"{name} {value}" in GONE:
            raise ArgumentError(GONE[f"{name} {value}"])
    return {name: value for name, value in values.items() if name not in GONE}
