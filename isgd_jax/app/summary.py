"""What someone who looks at a run for ten seconds wants to know: its state, a row of key numbers, what is unusual."""

from collections.abc import Sequence
from typing import NamedTuple

from isgd_jax.app.records import Record, is_number
from isgd_jax.app.run_dir import RunDir

__all__ = ["ENDS", "KeyNumbers", "has_ended", "key_numbers", "shut_stretches", "state_of", "unusual"]


ENDS = ("finished", "stopped", "diverged")
"""Events that a run ends with, and its states then."""


class KeyNumbers(NamedTuple):
    """The last measurement of each; None where there is none, and where the last held-out loss is not finite."""

    step: int
    loss: float | None
    test_loss: float | None
    test_error: float | None
    variance: float | None
    """Tr Cov of batches as they are drawn, over that of uniform draws; of one draw where batches were not measured."""
    equivalent_batch: float | None
    """Uniform draws of the same variance as a batch."""
    share_scoring: float | None
    """Of the time after start-up."""
    trusted_share: float | None
    seconds: float | None


def key_numbers(lines: Sequence[Record], *, batch_size: int) -> KeyNumbers:
    """Of the lines of progress of a run, oldest first.

    Args:
        lines: records of the event ``progress``.
        batch_size: draws in a step.
    """
    drawn, uniform, ratio = _last(lines, "sd_drawn"), _last(lines, "sd_uniform"), _last(lines, "variance_ratio")
    variance = ratio if drawn is None or not uniform else (drawn / uniform) ** 2
    return KeyNumbers(
        lines[-1]["step"] if lines else 0,
        _last(lines, "loss"),
        _at_last(lines, "test_loss"),
        _at_last(lines, "test_error"),
        variance,
        batch_size / variance if variance else None,
        _last(lines, "share_scoring"),
        _last(lines, "trusted_share"),
        _last(lines, "seconds"),
    )


def has_ended(records: Sequence[Record]) -> bool:
    """Whether the run has said that it finished, was stopped, or diverged."""
    return bool(records) and records[-1]["event"] in ENDS


def state_of(run: RunDir, records: Sequence[Record]) -> str:
    """One word: running, where somebody on this host writes to it; finished, stopped, diverged; killed, where nobody
    does any more; else "on HOST?".

    Args:
        run: its folder; of it the file that says who writes is read.
        records: of its metrics.jsonl, oldest first; "empty" is a run without any that nobody writes to.
    """
    holder = run.holder()
    if holder is not None and holder.is_alive:  # also one that goes on with a run that had ended
        return "running"
    if has_ended(records):
        return str(records[-1]["event"])
    if holder is None:
        return "killed" if records else "empty"
    return f"on {holder.host}?" if holder.is_alive is None else "killed"


def shut_stretches(records: Sequence[Record]) -> list[tuple[int, int]]:
    """From which step to which the gate was shut: from its records; one that is still shut lasts to the last step.

    >>> gate = [{"event": "gate", "step": 100, "at": 64, "is_open": False}, {"event": "progress", "step": 200}]
    >>> shut_stretches(gate)
    [(64, 200)]

    Args:
        records: of metrics.jsonl, oldest first.
    """
    stretches, since = list[tuple[int, int]](), None
    for record in records:
        if record["event"] == "gate":
            if record.get("is_open") and since is not None:
                stretches.append((since, record["at"]))
                since = None
            elif not record.get("is_open") and since is None:
                since = record["at"]
    if since is not None:
        stretches.append((since, max(records[-1]["step"], since)))
    return stretches


def unusual(records: Sequence[Record], *, batch_size: int) -> list[str]:
    """What a person should look at, in words; nothing where all is as it should be.

    Warnings of the run itself, and what its numbers show: a gate that was shut, variance above that of uniform draws,
    scoring that takes more than half the time, scores that are too old, workers that stopped, a held-out loss that
    rises.

    Args:
        records: of its metrics.jsonl, oldest first.
        batch_size: draws in a step.
    """
    lines = [record for record in records if record["event"] == "progress"]
    found, last = [str(record.get("text")) for record in records if record["event"] == "warning"], lines[-1:]
    numbers, shut = key_numbers(lines, batch_size=batch_size), shut_stretches(records)
    total = numbers.step
    if shut and total:
        share = sum(end - begin for begin, end in shut) / total
        found.append(f"the gate was shut for {share:.0%} of the updates: the scores did harm, and draws were uniform")
    if numbers.variance is not None and numbers.variance > 1:
        found.append(f"the variance is {numbers.variance:.2f} times that of uniform draws at the end: scores are too "
                     "old, or trusted too much")  # fmt: skip
    if numbers.share_scoring is not None and numbers.share_scoring > 0.5:
        found.append(f"scoring takes {numbers.share_scoring:.0%} of the time: refresh more rarely")
    if numbers.trusted_share is not None and numbers.trusted_share < 0.5:
        found.append(f"only {numbers.trusted_share:.0%} of the scores are trusted: they are older than --max-age")
    refreshes = [record for record in records if record["event"] == "refresh"][-1:]  # inline all score at a refresh
    idle = any(line.get("scores_per_second") == 0 and line.get("workers") for line in last)
    if idle and any(refresh.get("scored") == 0 for refresh in refreshes):
        found.append("no worker scores any more")
    held_out = [line["test_loss"] for line in lines if is_number(line.get("test_loss"))]
    if held_out and numbers.test_loss is None:
        found.append("the held-out loss is not finite any more")
    if len(held_out) > 2 and held_out[-1] > 1.2 * min(held_out):
        best = min((line for line in lines if line.get("test_loss") == min(held_out)), key=lambda line: line["step"])
        found.append(f"the held-out loss was lowest at update {best['step']:,}, and has risen since")
    return list(dict.fromkeys(found))


def _at_last(lines: Sequence[Record], field: str) -> float | None:
    """Of the last line that has the field at all: what is not finite is None there, and no older number is shown."""
    value = next((line[field] for line in reversed(lines) if field in line), None)
    return float(value) if is_number(value) else None


def _last(lines: Sequence[Record], field: str) -> float | None:
    return next((float(line[field]) for line in reversed(lines) if is_number(line.get(field))), None)
