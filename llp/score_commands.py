"""`llp score` and `llp calibrate`: any table of trials ranked; what the weights rest on.

"Not enough evidence" is an answer and ends with 0; only bad input does not.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llp.errors import SpecError
from llp.shell import ROOT, Json, Root, emit, say

if TYPE_CHECKING:
    import pandas as pd

    from llp.scoring import Calibration, Roles

SHOWN = 10

RolesFile = typer.Option(
    "--roles",
    metavar="ROLES.yaml",
    help="hyperparameters: [..], tier1: {column: higher|lower}, tier2: {column: "
    "higher|lower|unknown}, study, target (higher is better)",
    exists=True,
    dir_okay=False,
    show_default=False,
)


def score(
    tables: Annotated[
        list[Path],
        typer.Argument(
            metavar="TABLE",
            help="parquet or CSV, one row per trial; an empty target: to be ranked",
            exists=True,
            dir_okay=False,
        ),
    ],
    roles: Annotated[Path, RolesFile],
    history: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="OTHER...",
            help="tables of earlier studies, with targets",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="parquet or CSV to write", show_default=False),
    ] = None,
    preset: Annotated[str, typer.Option(help="calibrated, validation or llp")] = "calibrated",
    seed: Annotated[int, typer.Option(help="of draws", min=0)] = 0,
    json: Json = False,
) -> None:
    """Rank the trials of any table: score, interval, P(best), contributions, and their evidence."""
    from llp.score_tables import (
        check_ending,
        check_roles,
        check_writable,
        read_roles,
        read_table,
        write_table,
    )
    from llp.scoring import score as scored
    from llp.scoring import verification_set

    if len(tables) > 1 and not history:
        raise SpecError("one table at a time; tables to learn from go behind --history")
    declared = read_roles(roles)
    table = read_table(tables[0])
    if out is not None:
        check_writable(out)
        check_ending(out)
    earlier = [*(history or []), *tables[1:]]
    past = [read_table(path) for path in earlier]
    to_rank = bool(past) and declared.target is not None and declared.target not in table
    check_roles(replace(declared, target=None) if to_rank else declared, table, tables[0])
    for other, path in zip(past, earlier, strict=True):
        check_roles(declared.of_history(other), other, path)
    numbered = table.reset_index(drop=True)
    found = scored(numbered, roles=declared, preset=preset, history=past or None, seed=seed)
    usable = len(found.diverged) < len(table)
    chosen = verification_set(found) if usable else ()
    labels: dict[Hashable, str] = {
        row: str(label) for row, label in zip(numbered.index, table.index, strict=True)
    }
    if out is not None:
        scores = found.table.sort_index()
        scores.index = table.index
        write_table(scores, out)
    if json:
        columns = [str(name) for name in found.table.columns]
        for row, values in zip(found.table.index, found.table.to_numpy().tolist(), strict=True):
            emit(
                {"event": "score", "trial": labels[row], **dict(zip(columns, values, strict=True))}
            )
        emit(
            {
                "event": "scores",
                "preset": found.preset,
                "weights": dict(found.weights),
                "sentence": found.sentence,
                "verify": [labels[row] for row in chosen],
                "out": str(out) if out is not None else None,
            }
        )
        return
    if len(table):
        _show_scores(found.table, found.ranks, labels)
    typer.echo(found.sentence)
    if chosen:
        typer.echo(
            f"Verify {len(chosen)} of {len(table)}: together they hold the best with probability "
            f"{found.table.loc[list(chosen), 'probability_best'].sum():.2f}."
        )
    if out is not None:
        typer.echo(out)


def _show_scores(frame: pd.DataFrame, ranks: pd.DataFrame, labels: Mapping[Hashable, str]) -> None:
    lines: list[tuple[str, ...]] = [("trial", "score", "interval", "P(best)", "rank")]
    columns = ["score", "lower", "upper", "probability_best"]
    shown = frame.head(SHOWN)
    places = ranks.loc[shown.index, ["lower", "upper"]].to_numpy().tolist()
    for row, values, (first, last) in zip(
        shown.index, shown[columns].to_numpy().tolist(), places, strict=True
    ):
        score_, low, high, best = values
        lines.append(
            (
                labels[row],
                f"{score_:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{best:.2f}",
                f"{first:.0f} to {last:.0f}",
            )
        )
    _table(lines)
    if len(frame) > SHOWN:
        typer.echo(f"and {len(frame) - SHOWN} more")


def calibrate(
    studies: Annotated[
        list[str],
        typer.Argument(metavar="STUDY...", help="study folders or names; with --roles: tables"),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="column to learn from, such as test_accuracy; default: verified_accuracy",
            show_default=False,
        ),
    ] = None,
    roles: Annotated[Path | None, RolesFile] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON file to write", show_default=False)
    ] = None,
    root: Root = ROOT,
    seed: Annotated[int, typer.Option(help="of shuffles", min=0)] = 0,
    json: Json = False,
) -> None:
    """What the weights of the score would be, and the evidence for them: does tier 2 help?"""
    from llp.records import to_plain
    from llp.score_tables import (
        check_roles,
        check_writable,
        read_roles,
        read_table,
        table_of_study,
        write_text,
    )
    from llp.scoring import calibrate as calibrated

    declared: Roles | None = None
    if out is not None:
        check_writable(out)
    if roles is not None:
        declared = read_roles(roles)
        tables = [read_table(Path(name)) for name in studies]
        wanted = replace(declared, target=target or declared.target)
        for table, name in zip(tables, studies, strict=True):
            check_roles(wanted.present_in(table, tables), table, Path(name))
    else:
        tables = [table_of_study(name, root) for name in studies]
    found = calibrated(tables, target=target, roles=declared, seed=seed)
    if out is not None:
        write_text(found.to_json() + "\n", out)
    if json:
        emit({"event": "calibration", **to_plain(found)})
        return
    _show_calibration(found)
    if out is not None:
        say(f"written to {out}")


def _show_calibration(found: Calibration) -> None:
    rows = []
    for name, weight in found.weights.items():
        error = found.standard_errors[name]
        known = f"± {error:.3f}" if math.isfinite(error) else "(given, not estimated)"
        rows.append((name, f"{weight:+.3f} {known}"))
    _table([("weight of", f"for {found.target}"), *rows])
    if found.rankings:
        typer.echo("")
        lines: list[tuple[str, ...]] = [("ranking", "tau", "90 % interval", "regret@1", "regret@5")]
        for one in found.rankings:
            name = f"{one.name} (in force)" if one.name == found.in_force else one.name
            interval = f"{one.interval.low:+.3f} to {one.interval.high:+.3f}"
            numbers = [_number(x, 2) for x in (one.regret_at_1, one.regret_at_5)]
            lines.append((name, _number(one.tau, 3), interval, *numbers))
        _table(lines)
        typer.echo("")
    gain, shuffled = found.gain_validation, found.gain_tier2
    if gain is not None:
        typer.echo(
            f"gain in tau over validation alone: {gain.value:+.3f} "
            f"({gain.interval.low:+.3f} to {gain.interval.high:+.3f})"
        )
    if shuffled is not None:
        typer.echo(
            f"gain of tier 2: {shuffled.value:+.3f} ({shuffled.interval.low:+.3f} to "
            f"{shuffled.interval.high:+.3f}); shuffled over configurations: "
            f"{shuffled.shuffled:+.3f}"
        )
    typer.echo(f"effective number of studies: {found.effective_studies:.1f}")
    typer.echo(found.sentence)


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "none"


def _table(lines: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())
