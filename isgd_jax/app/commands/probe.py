"""`isgd probe`: can importance sampling pay for this model, on this data, on this machine?"""

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isgd_jax.app.config import DataConfig, ModelConfig, ScoringConfig, TrainingConfig
from isgd_jax.app.fields import must
from isgd_jax.app.files import make_folder, write_whole, writing
from isgd_jax.app.run_dir import RunDir

if TYPE_CHECKING:
    from rich.table import Table

    from isgd_jax.app.probe import Probe as Findings


__all__ = ["Probe", "run"]


@dataclass(frozen=True)
class Probe:
    """Measure whether importance sampling can pay, before training or at a checkpoint, and say so.

    The spread of the gradients' norms says what could be gained; scoring and a step are timed here.

    A few hundred real steps show how fast scores get worthless; then both ways are tried.

    With --model and --loss it is your own model.

    Attributes:
        run: Folder of a run: probe its newest checkpoint. Its configuration is taken from there.
        after: Steps of plain SGD to make first: at initialization norms are nearly alike, and there is little to gain
            yet.
        ages: After so many steps the scores are tried again; these are also the refresh periods that are judged.
        examples: Training examples whose norms are measured, drawn at random.
        trial: Steps by importance sampling that are tried against plain SGD for as long. Best are as many
            as are to come. Default: as many as were made before, or fit in a minute; 0: none.
        out: Folder for figures, page and numbers. Default: runs/probe-<dataset>-<time>, or probe/ in that of the run.
        mixture: Share of uniform draws in the proposals that are judged; 0.3 suits scores that get old.
    """

    run: str | None = None
    after: int = 0
    ages: tuple[int, ...] = (10, 30, 100, 300)
    examples: int = 4096
    trial: int | None = None
    out: str | None = None
    mixture: float = 0.3
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    scoring: ScoringConfig = dataclasses.field(default_factory=ScoringConfig)

    @classmethod
    def of_run(cls, folder: str) -> "Probe":
        """The probe of a run's newest checkpoint, with its configuration.

        Raises:
            FileNotFoundError: this is not the folder of a run.
            ValueError, TypeError: its configuration cannot be read.
        """
        config = RunDir(Path(folder)).read_config()
        mixture = config.sampling.mixture
        return cls(
            run=folder,
            mixture=cls.mixture if isinstance(mixture, str) or mixture == 0 else mixture,
            data=config.data,
            model=config.model,
            training=config.training,
            scoring=config.scoring,
        )


def run(command: Probe) -> int:
    """Run `isgd probe`: measure, print the tables and the verdict, write figures and page; returns the exit code.

    Into the folder go ``norms.png``, ``ageing.png``, ``periods.png``, ``probe.json`` and ``probe.html``. They are
    written when all is measured, into a folder that is made before; in the folder of a run, below ``probe/``.

    Raises:
        ValueError: an argument is out of range, the data are not held on the device, the run has example weights or
            augmented examples, or the checkpoint is of another model or data set.
        FileNotFoundError: the run has no checkpoint.
        OSError: the folder cannot be written to.
        FloatingPointError: the gradients are not finite.
    """
    from isgd_jax.app import data, task
    from isgd_jax.app.probe import check_probeable, probe, probed_of
    from isgd_jax.app.terminal import Terminal

    console, named = Terminal(), command.data
    must(named, "hold", named.hold == "device", "device, where the probe measures")
    if command.run is not None:
        check_probeable(RunDir(Path(command.run)).read_config(), Path(command.run))
    dataset = data.load(named.dataset, data_dir=named.data_dir, raw_dir=named.raw_dir)
    work, out = task.make(command.model, dataset), folder(command)
    with _writable(out):
        found = probe(
            probed_of(command.training, command.scoring, work, mixture=command.mixture),
            run=None if command.run is None else Path(command.run),
            after=command.after,
            ages=sorted(set(command.ages)),
            num_examples=command.examples,
            trial_steps=command.trial,
        )
    for remark in found.remarks:
        print(f"isgd: {remark}", file=sys.stderr, flush=True)
    for part in (*tables(found), "\n".join(found.words)):
        console.print(part, "", sep="\n", soft_wrap=True, highlight=False)
    for path in write(found, out, f"{named.dataset}, {command.model.model}"):
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)
    return 0


@contextlib.contextmanager
def _writable(out: Path) -> Iterator[None]:
    """The folder is made before minutes are spent on measuring; where that fails what was made is gone again."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        make_folder(out)
        with writing(out):
            tempfile.TemporaryFile(dir=out).close()
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def folder(command: Probe) -> Path:
    """Where the probe's files go."""
    if command.out is not None:
        return Path(command.out)
    if command.run is not None:
        return RunDir(Path(command.run)).own("probe")
    return Path(f"runs/probe-{command.data.dataset}-{time.strftime('%Y%m%d-%H%M%S')}")


def write(found: "Findings", out: Path, what: str) -> list[Path]:
    """Write figures, page and numbers.

    Args:
        found: by `isgd_jax.app.probe.probe`.
        out: the folder; it is made if need be.
        what: was probed, as the page's title says it.

    Returns:
        The files.
    """
    from isgd_jax.app import figures
    from isgd_jax.app.html import probe_page
    from isgd_jax.app.probe import figures_of

    make_folder(out)
    paths = []
    with figures.style():
        for name, drawn in figures_of(found.spread.norms, found.by_age, found.periods).items():
            paths.append(out / f"{name}.png")
            write_whole(paths[-1], figures.png(drawn))
    paths += [out / "probe.json", out / "probe.html"]
    write_whole(paths[-2], json.dumps(numbers(found), indent=2) + "\n")
    write_whole(paths[-1], probe_page(found, what))
    return paths


def numbers(found: "Findings") -> dict[str, Any]:
    """All that was found but the norms themselves, as JSON has it."""
    spread = found.spread._asdict()
    del spread["norms"]
    return found._asdict() | {
        "spread": spread,
        "costs": found.costs._asdict(),
        "is_unlearnt": found.is_unlearnt,
        "tried": None if found.tried is None else found.tried._asdict() | {"gain": found.tried.gain._asdict()},
        "periods": [
            period._asdict()
            | {"at_equal_time": period.at_equal_time, "at_equal_time_elsewhere": period.at_equal_time_elsewhere}
            for period in found.periods
        ],
    }


def tables(found: "Findings") -> list["Table"]:
    """What was measured, as a person reads it: the norms, the costs in seconds, and the gains by refresh period."""
    spread, costs = found.spread, found.costs
    norms = _table(f"Norms of {found.num_examples:,} gradients after {found.num_updates:,} updates", "quantile", "norm")
    for at, value in spread.quantiles.items():
        norms.add_row(f"{at:.0%}", f"{value:.4g}")
    norms.add_row("1 + CV²", f"{spread.second_moment_ratio:.4g}")
    norms.add_row("Tr Cov uniform / ideal", f"{spread.uniform / spread.ideal:.4g}" if spread.ideal else "infinite")
    time_table = _table("Costs on this machine", "what", "seconds", "plain updates")
    for name, seconds in (
        ("plain update", costs.update),
        ("reweighted update, fresh norms", costs.reweighted_update),
        ("scoring one example", costs.score_example),
        ("scoring all examples", costs.score_all),
    ):
        time_table.add_row(name, f"{seconds:.3g}", f"{seconds / costs.update:.3g}")
    gains = _table(
        f"Gains by refresh period (mixture {found.mixture:g})",
        "updates between refreshes", "stale/uniform at that age", "variance", "time", "variance · time",
        "scored elsewhere",
    )  # fmt: skip
    for period in found.periods:
        numbers = (period.variance, period.time, period.at_equal_time, period.at_equal_time_elsewhere)
        gains.add_row(f"{period.every:,}", f"{found.by_age[period.every]:.3f}", *(f"{x:.2f}" for x in numbers))
    return [norms, time_table, gains]


def _table(title: str, *heads: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None)
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right")
    return table
