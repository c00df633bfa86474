"""What a person sees while a run goes on: the plan, a line of progress at a time, and a table at the end."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from isgd_jax.app.clock import account
from isgd_jax.app.flags import in_flags
from isgd_jax.app.records import Record


def _number(value: float | int) -> str:
    """Three digits that count, in at most seven columns."""
    text = f"{value:.3g}"
    return text if len(text) <= 7 else f"{value:.1e}"


def _gate(is_open: bool) -> str:
    return "" if is_open else "shut"


def _percent(value: float | int) -> str:
    return f"{100 * value:.1f}%"


def _whole(value: float | int) -> str:
    return f"{value:.0f}"


COLUMNS: dict[str, tuple[str, int, Callable[[Any], str]]] = {
    "step": ("step", 7, _whole),
    "steps_per_second": ("steps/s", 7, _number),
    "loss": ("loss", 8, _number),
    "test_loss": ("held-out", 8, _number),
    "test_error": ("error", 6, _percent),
    "sd_uniform": ("uniform", 7, _number),
    "sd_stale": ("stale", 7, _number),
    "sd_ideal": ("ideal", 7, _number),
    "sd_drawn": ("drawn", 7, _number),
    "variance_ratio": ("ratio", 5, "{:.2f}".format),
    "trusted_share": ("trust", 6, _percent),
    "share_scoring": ("scoring", 7, _percent),
    "gate_is_open": ("gate", 4, _gate),
}
"""A line of progress: field of the record, head of the column, width, how it is written."""

LEGEND = (
    "loss: mean(s·L) of the draws. uniform, stale, ideal: √Tr Cov of one draw's gradient; drawn: the same of batches "
    "as they were drawn, √(M Tr Cov). ratio: variance of stale over uniform, below 1 the scores help. trust: share of "
    "scores young enough to be used. scoring: share of the time after start-up. gate: shut while the scores do harm, "
    "and draws are uniform. All else, with bands, is in metrics.jsonl and the figures; isgd watch shows it live."
)

__all__ = ["COLUMNS", "LEGEND", "RunConsole"]


class RunConsole:
    """An observer of `isgd_jax.app.run.fit`: a bar below the lines on a terminal, plain lines elsewhere.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=None)
        self._last: Record = {}

    def __enter__(self) -> "RunConsole":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, record: Record) -> None:
        """Show a record, if it is of a kind that a person should see."""
        show = {
            "plan": self._plan,
            "progress": self._progress,
            "warning": self._warning,
            "gate": self._gate,
            "finished": self._end,
            "stopped": self._end,
            "wrote": self._wrote,
        }.get(record["event"])
        if show is not None:
            show(record)

    def _plan(self, plan: Record) -> None:
        table = Table(title="The plan", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for what, value in _describe(plan):
            table.add_row(Text(what, style="bold"), Text(value))
        self._console.print(table, "", LEGEND, "", sep="\n")
        self._print(_row({field: head for field, (head, _, _) in COLUMNS.items()}), style="bold")
        self._bar.update(self._task, total=plan["num_steps"], completed=plan["first_step"])
        self._bar.start()

    def _progress(self, record: Record) -> None:
        fields = [field for field in COLUMNS if record.get(field) is not None]
        written = {field: COLUMNS[field][2](record[field]) for field in fields}
        self._print(_row(written), style=None if record.get("gate_is_open", True) else "yellow")
        self._bar.update(self._task, completed=record["step"])
        self._last = record

    def _warning(self, record: Record) -> None:
        self._wrap(f"warning at step {record['step']}: {in_flags(record['text'])}")

    def _gate(self, record: Record) -> None:
        self._wrap(f">> gate {'opened' if record['is_open'] else 'shut'} at step {record['at']}: {record['reason']}")

    def _end(self, record: Record) -> None:
        self._bar.stop()
        table = Table(title=f"{record['event'].capitalize()} at step {record['step']}", title_justify="left", box=None)
        table.add_column("where the time went")
        table.add_column("seconds", justify="right")
        table.add_column("of all", justify="right")
        for task, seconds, share in account(record["spent"], record["seconds"]):
            table.add_row(task, f"{seconds:.1f}", _percent(share))
        table.add_section()
        for field, label in (("test_loss", "held-out loss"), ("test_error", "held-out error")):
            if self._last.get(field) is not None:
                table.add_row(label, "", COLUMNS[field][2](self._last[field]))
        self._console.print("", table, sep="\n")

    def _wrote(self, record: Record) -> None:
        self._print("\nThe run's folder:")
        for path in record["paths"]:
            self._print(f"  {path}")

    def _wrap(self, text: str) -> None:
        self._console.print(text, style="yellow", highlight=False, markup=False)

    def _print(self, line: str, style: str | None = None) -> None:
        self._console.print(line, style=style, soft_wrap=True, highlight=False, markup=False)


def _row(written: dict[str, str]) -> str:
    return " ".join(written.get(field, "-").rjust(width) for field, (_, width, _) in COLUMNS.items())


def _describe(plan: Record) -> list[tuple[str, str]]:
    """The plan in words."""
    config = plan["config"]
    update, refresh, every = plan["seconds_per_update"], plan["seconds_per_refresh"], config["refresh_every"]
    rows = [
        ("data", f"{config['dataset']}, N = {plan['num_examples']:,} training examples"),
        ("model", f"{config['model']}, {plan['num_params']:,} parameters"),
        ("devices", ", ".join(plan["devices"])),
        ("updates", f"{plan['first_step']:,} to {plan['num_steps']:,}, {config['batch_size']} draws each"),
        ("optimizer", f"{config['optimizer']}, rate {config['learning_rate']:g} ({config['schedule']})"),
        ("mode", f"{config['mode']}, {plan['sampler']} draws"),
    ]
    share = plan["share_scored"]
    if share > 0:
        scored = "all examples" if share == 1 else f"{_percent(share)} of the examples"
        scored = f"{scored} every {every} updates"
        if config["engine"] != "inline" and config["mode"] == "relaxed":
            published = config["publish_every"] or every
            scored = f"by workers meanwhile, with parameters of every {published} updates; taken in every {every}"
        rows += [
            ("proposal", f"{config['scorer']} scores, mixture {config['mixture']}, additive {config['additive']:g}"),
            ("scoring", f"{scored}; expected to take "
                        f"{_percent(refresh / (refresh + every * update))} of the training time "
                        f"({refresh:.2g} s beside {every} updates of {1000 * update:.2g} ms)"),
        ]  # fmt: skip
    return [*rows, ("folder", plan["run_dir"])]
