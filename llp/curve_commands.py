"""`llp curves`: fits the prior of learning curves to tables, and says how well it forecasts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llp.errors import SpecError
from llp.shell import Commands, Json, emit, make_place, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from llp.probing.curve_evaluation import Score

curves = typer.Typer(
    name="curves",
    cls=Commands,
    help="Learning-curve forecasts: fit their prior to tables of curves, judge it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Tables = Annotated[
    list[Path],
    typer.Argument(
        metavar="TABLE...",
        help="parquet or CSV with task, curve, position, value [source, higher_is_better, "
        "schedule_remaining], or the files of AlgoPerf, TaskSet or LCDB",
        exists=True,
        dir_okay=False,
    ),
]
Folds = Annotated[
    int, typer.Option(help="groups of a source's tasks that are left out in turn", min=2)
]
Networks = Annotated[int, typer.Option(help="networks of the ensemble", min=1)]
Seed = Annotated[int, typer.Option(help="of the fit")]


@curves.command()
def fit(
    tables: Tables,
    out: Annotated[Path, typer.Option("--out", "-o", help="file to write")] = Path(
        "curve_prior.json"
    ),
    folds: Folds = 7,
    networks: Networks = 4,
    seed: Seed = 0,
    evidence: Annotated[
        bool, typer.Option(help="also fit with tasks left out and store how that did")
    ] = True,
) -> None:
    """Fit the prior to tables of curves; its file holds how it did on tasks left out."""
    from dataclasses import replace

    from llp.curve_files import read_tables
    from llp.probing import curve_evaluation, curve_fitting

    make_place(out)
    read = read_tables(tables)
    options = curve_fitting.FitOptions(num_networks=networks, seed=seed)
    library = curve_fitting.Library(read, options)
    prior = curve_fitting.fit(read, options, library=library)
    if evidence:
        groups = curve_evaluation.folds(read, folds)
        scores = curve_evaluation.judge(
            read, options, left_out=groups, library=library, on_fold=_progress(len(groups))
        )
        prior = replace(prior, evidence=curve_evaluation.evidence(scores))
        _show(scores)
    out.write_text(prior.dump() + "\n", encoding="utf-8")
    typer.echo(out)


@curves.command()
def evaluate(
    tables: Tables,
    prior: Annotated[
        Path | None,
        typer.Option(
            help="judge this prior as it is; it must not know the tables", show_default=False
        ),
    ] = None,
    shipped: Annotated[bool, typer.Option("--shipped", help="judge the shipped prior as it is")] = (
        False
    ),
    folds: Folds = 7,
    networks: Networks = 4,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Print error, log density, rank correlation and coverage beside last value and pow3.

    By default the prior is fitted again without the tasks that are judged. "no fit" is the share of
    curves on which pow3 could not be fitted and keeps the last value.
    """
    from llp.curve_files import read_tables
    from llp.probing import curve_evaluation, curve_fitting
    from llp.probing.curve_prior import load

    if shipped and prior is not None:
        raise SpecError("--shipped and --prior exclude each other")
    read = read_tables(tables)
    if shipped or prior is not None:
        scores = curve_evaluation.judge_prior(read, load(prior))
    else:
        groups = curve_evaluation.folds(read, folds)
        scores = curve_evaluation.judge(
            read,
            curve_fitting.FitOptions(num_networks=networks, seed=seed),
            left_out=groups,
            on_fold=_progress(len(groups)),
        )
    scores += curve_evaluation.judge_baselines(read)
    if json:
        for row in curve_evaluation.summary(scores):
            emit({"event": "score", **asdict(row)})
    else:
        _show(scores)


def _progress(num: int) -> Callable[[int], None]:
    return lambda done: say(f"fitted without group {done + 1} of {num}")


def _show(scores: Iterable[Score]) -> None:
    from llp.probing import curve_evaluation

    intervals = [f"in {100 * level:.0f} %" for level in curve_evaluation.INTERVALS]
    lines = [
        (
            "source",
            "seen",
            "method",
            "tasks",
            "error",
            "log density",
            "spearman",
            *intervals,
            "no fit",
        ),
        *(
            (
                row.source,
                f"{100 * row.share:.0f} %",
                row.method,
                row.task.split()[0],
                f"{row.error:.4f}",
                f"{row.log_density:.2f}",
                f"{row.spearman:.3f}",
                *(f"{100 * part:.1f}" for part in row.coverage),
                f"{100 * row.unfitted:.1f} %" if row.unfitted else "",
            )
            for row in curve_evaluation.summary(scores)
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {0, 2}
    for line in lines:
        cells = (
            cell.ljust(width) if k in left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        typer.echo("  ".join(cells).rstrip())
