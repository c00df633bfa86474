"""The page of one run or of several: what came out, figures, hardest examples, and all that it was run with."""

from collections.abc import Container, Sequence
from typing import Any

from isgd_jax.app import figures, plots
from isgd_jax.app.clock import account
from isgd_jax.app.config import Config
from isgd_jax.app.flags import in_flags
from isgd_jax.app.html import hardest
from isgd_jax.app.html.html import NOTHING, duration, inline, number, percent, render
from isgd_jax.app.labels import label
from isgd_jax.app.records import Record
from isgd_jax.app.run_dir import RunDir
from isgd_jax.app.summary import key_numbers, shut_stretches, unusual
from isgd_jax.errors import ArgumentError

__all__ = ["run_page"]

ROWS = 30
"""Lines of progress in the table; of more, every so many are shown, and always the last."""

CAPTIONS = {
    "loss": "mean(s·L) of the draws estimates the training loss without bias, whatever the proposal.",
    "error": "The share of examples whose largest output is not their label.",
    "variance": "How far the gradient of one draw is from the mean gradient. In use should lie well below uniform; "
    "ideal is the least that independent draws could reach at that moment.",
    "ratio": "Below 1 the scores help; above 1 they hurt.",
    "scores": "The largest weight is bounded by one over the mixture. Old scores cost variance, never bias.",
    "time": "Measuring these numbers is left out when runs are compared by their seconds.",
    "others": "Everything else the run wrote down.",
    "norms": "UNIFORM over IDEAL is at least the square of the root mean square over the mean.",
    "weights": "Of the proposal at the newest checkpoint. Large weights belong to examples that are seldom drawn: "
    "they hurt only where such an example turns out to have a large gradient.",
}


def run_page(runs: Sequence[RunDir]) -> str:
    """One page of these runs, as HTML. A run that is still going on, or was stopped, is shown as it stands.

    Nothing is written, and nothing imported or downloaded that a run's files name; what is missing, or damaged, beside
    the records and the configuration is said in its place.

    Args:
        runs: their folders, at least one; they may be a stranger's.

    Raises:
        FileNotFoundError: a folder is not that of a run.
        ValueError: its configuration or its records are damaged.
    """
    sections = [_section(run, i) for i, run in enumerate(runs)]
    return render("run.html", title=sections[0]["name"] if len(sections) == 1 else "Runs", sections=sections)


def _section(run: RunDir, i: int) -> dict[str, Any]:
    config = run.read_config()
    sampling, named = config.sampling, f"{config.data.dataset}, {config.model.model}"
    records = list(run.records())
    lines = [record for record in records if record["event"] == "progress"]
    scored, not_scored = _scores(run)
    with figures.style():
        drawn = plots.all_figures(lines, shut=shut_stretches(records))
        if scored is not None:
            drawn["norms"] = plots.norms_figure(scored.known, what="score, as last measured")
            if scored.probs is not None:
                drawn["weights"] = plots.weights_figure(scored.probs)
        pictures = inline(drawn, f"run{i}")
    return {
        "id": f"run{i}",
        "name": run.path.resolve().name,
        "summary": f"{named}, {sampling.mode} mode, {sampling.sampler_in_use} draws",
        "state": _state(records),
        "tiles": _tiles(lines, config),
        "unusual": [in_flags(text) for text in unusual(records, batch_size=config.training.batch_size)],
        "figures": pictures,
        "captions": CAPTIONS,
        "progress": _progress_table(lines),
        "spent": _spent(records),
        "events": [r for r in records if r["event"] not in ("progress", "refresh", "finished", "stopped")][-50:],
        "scored": scored,
        "not_scored": not_scored,
        "config": _configuration(config),
        "environment": _environment(run),
    }


def _scores(run: RunDir) -> tuple[hardest.Scores | None, str | None]:
    """The hardest examples, or why there are none where there should be."""
    try:
        return hardest.scores(run), None
    except ArgumentError as error:
        return None, f"The hardest examples are missing: {error}."


def _state(records: Sequence[Record]) -> str:
    if not records:
        return "nothing recorded yet"
    last = records[-1]
    how = {"finished": "finished", "stopped": "stopped by a signal", "diverged": "diverged"}.get(
        last["event"], "going on, or killed"
    )
    return f"{how} at update {last['step']:,}, after {duration(last.get('seconds'))}"


def _tiles(lines: Sequence[Record], config: Config) -> list[tuple[str, str]]:
    """The numbers one looks for first, each as last measured."""
    if not lines:
        return []
    found = key_numbers(lines, batch_size=config.training.batch_size)
    tiles = [
        ("held-out error", percent(found.test_error)),
        ("held-out loss", number(found.test_loss)),
        ("of the variance saved", None if found.variance is None else percent(1 - found.variance)),
        ("equivalent plain batch", None if found.equivalent_batch is None else f"{found.equivalent_batch:,.0f}"),
        ("of the time spent on scoring", percent(found.share_scoring)),
        ("of the scores trusted", percent(found.trusted_share)),
    ]
    return [(name, value) for name, value in tiles if value not in (None, NOTHING)]


def _progress_table(lines: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows; what was measured with a band has it in its own cell, and switches and counts are words."""
    measured = dict.fromkeys(name for line in lines for name, value in line.items() if value is not None)
    fields = [name for name in measured if name != "event" and not _is_bound(name, measured)]
    every = -(-len(lines) // ROWS)
    shown = [line for i, line in enumerate(lines) if i % max(every, 1) == 0 or i == len(lines) - 1]
    return [label(name) for name in fields], [[_cell(line, name) for name in fields] for line in shown]


def _is_bound(name: str, measured: Container[str]) -> bool:
    stem, _, end = name.rpartition("_")
    return end in ("low", "high") and stem in measured


def _cell(line: Record, name: str) -> str:
    value, low, high = (line.get(field) for field in (name, f"{name}_low", f"{name}_high"))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{each} {number(count)}" for each, count in value.items())
    band = "" if low is None or high is None else f" [{number(low)}, {number(high)}]"
    return number(value) + band


def _spent(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    ends = [record for record in records if isinstance(record.get("spent"), dict)]
    if not ends:
        return []
    spent = {task: float(seconds) for task, seconds in ends[-1]["spent"].items()}
    rows = account(spent, float(ends[-1].get("seconds") or 0))
    return [(task, duration(seconds), percent(share)) for task, seconds, share in rows]


def _configuration(config: Config) -> list[tuple[str, str, bool]]:
    """Field, value, and whether it is not the default."""
    values, defaults = config.flat(), Config().flat()
    return [
        (
            name.replace("_", " "),
            " ".join(map(str, value)) if isinstance(value, tuple) else number(value),
            value != defaults[name],
        )
        for name, value in values.items()
    ]


def _environment(run: RunDir) -> list[tuple[str, str]]:
    found = run.environment()
    flat = {name: value for name, value in found.items() if not isinstance(value, (dict, list))}
    flat |= {name: ", ".join(map(str, value)) for name, value in found.items() if isinstance(value, list)}
    for value in found.values():
        flat |= value if isinstance(value, dict) else {}
    return [(name, str(value)) for name, value in flat.items()]
