"""`llp study FILE.yaml`: trains all configurations of some studies, and says what ranks them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llp.shell import Json, Quiet, Set, emit, say

if TYPE_CHECKING:
    from llp.errors import LlpError


def study(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="the definition, e.g. reports/evidence.yaml")
    ],
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="run this study only; repeatable"),
    ] = None,
    render_only: Annotated[
        bool, typer.Option("--render-only", help="run nothing, write the page")
    ] = False,
    override: Set = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="folder; default reports/out/NAME")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run studies in which every configuration is trained fully, and judge every ranking by them.

    What finished is not run again. One page: rankings by tier 1, hyperparameters and tier 2, every
    metric with what is left of it, strategies at equal compute.
    """
    from llp import evidence, matrix
    from llp.matrix_command import Shown
    from llp.spec.evidence import load_evidence

    found = load_evidence(file, override or ())
    found.chosen(only or ())
    failed: dict[str, LlpError] = {}
    if not render_only:
        command = shlex.join(["llp", *sys.argv[1:]])
        try:
            failed = matrix.run(found, Shown(json, quiet), only=only or (), command=command)
        except KeyboardInterrupt:
            say("interrupted; everything that finished is saved; go on with:\n  " + command)
            raise typer.Exit(130) from None
    path, numbers = evidence.write_page(found, out)
    if json:
        emit({"event": "evidence", "page": str(path), "evidence": numbers})
    else:
        if not quiet:
            say(numbers.sentence)
        typer.echo(path)
    for name, error in failed.items():
        say(f"{name}: {error}")
    if failed:
        raise next(iter(failed.values()))
