"""Scoring only while it pays: the part of the gate that decides by the clock.

A proposal that has the variance of one draw at R of uniform draws' is worth batches larger by 1/R. So scoring that
takes a share c of the time of the updates it serves pays while c < 1/R - 1. When it does not, the next refreshes are
left out: the scores grow older, and their cost is spread over more updates. After 1, 2, 4, ... 64 left out one is tried
again.

Guarantees:

* each decision carries its numbers and its reason, so that it can be logged and replayed;
* scoring that pays is never left out; scoring that never pays is tried in at most one refresh of 65, in the long run;
* what it knows is two whole numbers, saved with the run. Its decisions depend on the speed of the machine all the same.

Source: Katharopoulos & Fleuret (2018) for larger batches as the measure of a gain; the rest is ours.
"""

from typing import NamedTuple

MOST_PATIENCE = 64


class Decision(NamedTuple):
    """Whether to score, and why."""

    is_worth: bool
    cost: float | None
    """Seconds of scoring over seconds of the updates since the last refresh."""
    gain: float | None
    """1/R - 1."""
    reason: str


class Thrift(NamedTuple):
    """Refreshes left out in a row, and how many may be."""

    waited: int = 0
    patience: int = 1


def decide(
    thrift: Thrift, *, ratio: float | None, scoring_seconds: float | None, update_seconds: float
) -> tuple[Thrift, Decision]:
    """Whether the refresh that is due pays. ``ratio`` is R now; ``update_seconds`` since the last refresh."""
    if ratio is None or scoring_seconds is None or update_seconds <= 0:
        return Thrift(), Decision(True, None, None, "nothing is known yet of gain or cost")
    cost, gain = scoring_seconds / update_seconds, max(1.0 / max(ratio, 1e-6) - 1.0, 0.0)
    told = f"scoring takes {cost:.2f} of the time of the updates since the last, and gains {gain:.2f} of it"
    if cost <= gain:
        return Thrift(), Decision(True, cost, gain, told)
    if thrift.waited >= thrift.patience:
        tried = Thrift(0, min(2 * thrift.patience, MOST_PATIENCE))
        return tried, Decision(True, cost, gain, f"{told}; tried again after {thrift.waited} left out")
    return thrift._replace(waited=thrift.waited + 1), Decision(False, cost, gain, told)
