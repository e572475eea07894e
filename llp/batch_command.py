"""`llp batch FILE`: many named runs from one file, and the table and page that compare them."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llp.errors import SpecError, TrackingError
from llp.shell import Json, Quiet, Set, emit, say

if TYPE_CHECKING:
    from llp.batch_results import BatchResult
    from llp.spec.batch import Batch
    from llp.spec.batch_plan import Cost

SHOW_SECONDS = 1.0
"""Between two lines of progress, beside those of trainings that did not complete."""


def batch(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="batch file, or a JSON batch of the TALT project")
    ],
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="RUN", help="this run; repeatable")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print what it will train and cost, and stop")
    ] = False,
    render_only: Annotated[
        bool, typer.Option("--render-only", help="write table and page anew; train nothing")
    ] = False,
    convert: Annotated[
        bool, typer.Option("--convert", help="print a JSON batch as YAML, and stop")
    ] = False,
    drop: Annotated[
        list[str] | None,
        typer.Option("--drop", metavar="FIELD", help="leave a field of a JSON batch out"),
    ] = None,
    override: Set = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train many named runs with seeds, grids and studies; compare them on one page.

    Again: nothing that finished is trained again. The folder llp_batches/NAME gets report.html and
    runs.parquet.
    """
    from llp.spec.batch import load_batch
    from llp.spec.batch_json import convert_batch

    if Path(file).suffix == ".json":
        converted = convert_batch(file, drop=drop or ())
        for note in converted.notes:
            say(note)
        if convert:
            typer.echo(converted.yaml, nl=False)
            return
        found = converted.load(override or ())
    else:
        for option, given in (("--convert", convert), ("--drop", drop)):
            if given:
                raise SpecError(f"{option} is for the JSON batches of the TALT project")
        found = load_batch(file, override or ())
    if dry_run:
        _show_plan(found.chosen(only or ()), json=json)
    elif render_only:
        from llp.batch_results import write_results

        found.chosen(only or ())
        _show_result(write_results(found.folder), json=json, quiet=quiet)
    else:
        _run(found, only or (), json=json, quiet=quiet)


def _run(found: Batch, only: list[str] | tuple[()], *, json: bool, quiet: bool) -> None:
    from llp import batch as batches
    from llp.tracking.links import read_state

    data = batches.datasets(found.chosen(only))
    planned = batches.plan(found.chosen(only), data)
    shown = _Shown(planned, json=json, quiet=quiet)
    try:
        result = batches.run(found, only=only, data=data, on_event=shown, command=_command())
    except KeyboardInterrupt:
        say("interrupted; everything that finished is saved; go on with:\n  " + _command())
        raise typer.Exit(130) from None
    _show_result(result, json=json, quiet=quiet)
    shipped = read_state(found.folder) if found.tracking.mlflow else None
    if found.tracking.mlflow and not (shipped and shipped.complete):
        raise TrackingError(
            "the batch is done, but MLflow has not received all of it; see "
            f"{found.folder / 'mlflow.log'}, then run: llp sync {shlex.quote(str(found.folder))}"
        )


def _show_plan(found: Batch, *, json: bool) -> None:
    from llp import batch as batches

    planned = batches.plan(found)
    if json:
        emit({"event": "plan", "name": found.name, "folder": str(found.folder), "parts": planned})
        return
    rows = [("part", "configurations", "trainings", "samples")]
    rows += [
        (cost.name, f"{cost.configurations:,}", f"{cost.trainings:,}", f"{cost.samples:,}")
        for cost in planned
    ]
    total = [sum(getattr(c, name) for c in planned) for name in ("trainings", "samples")]
    rows.append(("together", "", f"{total[0]:,}", f"{total[1]:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        typer.echo("  ".join(cells).rstrip())
    typer.echo(f"folder {found.folder}")


def _show_result(result: BatchResult, *, json: bool, quiet: bool) -> None:
    if json:
        emit(
            {
                "event": "result",
                "answer": result.answer,
                "page": str(result.page),
                "table": str(result.table),
                "outcomes": dict(result.outcomes),
            }
        )
        return
    if not quiet:
        say(result.answer)
    bad = {k: n for k, n in result.outcomes.items() if k != "completed"}
    if bad:
        told = ", ".join(f"{count} {outcome}" for outcome, count in bad.items())
        say(f"full trainings that were not completed: {told}")
    typer.echo(result.page)
    typer.echo(result.table)


def _command() -> str:
    return shlex.join(["llp", *sys.argv[1:]])


class _Shown:
    """Shows how far a batch is: a line now and then, and one for every training that went wrong.

    Args:
        planned: What the batch is about to do, for the total.
        json: Every event as a JSON line instead.
        quiet: Nothing.
    """

    def __init__(self, planned: list[Cost], *, json: bool, quiet: bool) -> None:
        self._total = sum(cost.trainings for cost in planned)
        self._json, self._quiet = json, quiet
        self._done: set[str] = set()
        self._due = 0.0
        self._live = False

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Takes one event of the ledger; those of before `opened` are only counted."""
        kind = event["event"]
        self._live = self._live or kind == "opened"
        if self._json:
            emit(event)
        if kind == "job_end":
            end = event["end"]
            self._done.add(end["job_id"])
            if self._live and not self._json and not self._quiet:
                if end["outcome"] != "completed":
                    lines = str(end["failure"]).strip().splitlines()
                    say(f"{end['job_id']}: {end['outcome']}: {lines[-1] if lines else ''}")
                elif time.monotonic() > self._due or len(self._done) == self._total:
                    self._due = time.monotonic() + SHOW_SECONDS
                    say(f"{len(self._done)} of {self._total} trainings; last {end['job_id']}")
        elif kind == "chosen" and not self._json and not self._quiet:
            best = event["configuration_id"]
            if best is None:
                say(f"{event['run']}: no candidate was completed, so nothing is trained fully")
            else:
                accuracy = 100 * event["results"][best][0]
                say(f"{event['run']}: chose {best}, validation accuracy {accuracy:.2f} %")
