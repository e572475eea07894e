"""`llp report FILE.yaml`: runs what is missing of a report matrix and writes its pages."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

from llp import matrix
from llp.errors import LlpError, TrackingError
from llp.shell import emit, say


def report(
    file: str,
    *,
    only: Sequence[str] = (),
    render_only: bool = False,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    json: bool = False,
    quiet: bool = False,
    command: str = "",
) -> None:
    """Runs the configurations that are not finished and writes all pages.

    The pages are written also when a configuration failed; its error then ends the command.

    Raises:
        LlpError: As `matrix.load_matrix`, `matrix.run` and `matrix.write_pages`; or the first
            failure of a configuration, after everything else was done.
        typer.Exit: 130 on Ctrl-C; everything finished is saved.
    """
    found = matrix.load_matrix(file, overrides)
    chosen = found.chosen(only)
    failed: dict[str, LlpError] = {}
    if not render_only:
        try:
            failed = matrix.run(found, Shown(json, quiet), only=only, command=command)
        except KeyboardInterrupt:
            say("interrupted; everything that finished is saved; go on with:\n  " + command)
            raise typer.Exit(130) from None
    pages, answer = matrix.write_pages(found, out)
    states = matrix.look(found)
    if json:
        emit(
            {
                "event": "report",
                "name": found.name,
                "index": str(pages[0]),
                "answer": answer,
                "pages": [str(page) for page in pages],
                "configurations": {
                    name: {"status": study.status, "folder": str(study.folder)}
                    for name, study in states.items()
                },
            }
        )
    else:
        if not quiet:
            say(answer)
        typer.echo(pages[0])
    for name, study in states.items():
        if study.status != "finished" and name not in failed:
            say(f"{name}: {study.status}" + (f": {study.problem}" if study.problem else ""))
        elif study.changed:
            say(f"{name}: run with another definition: {matrix.shortened(study.changed)}")
    for name, error in failed.items():
        say(f"{name}: {error}")
    if failed:
        raise next(iter(failed.values()))
    behind = [] if render_only else matrix.not_in_mlflow(found, chosen)
    if behind:
        raise TrackingError(
            "the pages are done, but MLflow has not received all of it; run: "
            + "; ".join(f"llp sync {shlex.quote(str(folder))}" for folder in behind)
        )


class Shown:
    """Shows each study of a matrix as `llp search` would, under a line with its name."""

    def __init__(self, json: bool, quiet: bool) -> None:
        self._json, self._quiet = json, quiet

    @contextlib.contextmanager
    def __call__(self, name: str, number: int, total: int) -> Iterator[matrix.OnEvent]:
        """Where the events of the study `name` go while it runs."""
        from llp import views
        from llp.display import Reporter

        if not self._quiet:
            say(f"configuration {number} of {total}: {name}")
        if self._json:
            emit({"event": "configuration", "name": name, "number": number, "total": total})
        reporter = Reporter(
            console=views.console(stderr=True),
            machine=sys.stdout if self._json else None,
            quiet=self._quiet,
        )
        with reporter:
            yield reporter
