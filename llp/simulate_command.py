"""`llp simulate`: schedulers side by side on tabulated learning curves, in seconds."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llp.errors import SpecError
from llp.shell import Json, emit, make_folder, say

DEFAULT = (
    "random,median,tune_asha,tune_hyperband,optuna_halving,optuna_hyperband,asha_eager,hyperband"
)


def simulate(
    tables: Annotated[
        list[Path],
        typer.Argument(
            metavar="TABLE...",
            help="tables of learning curves, as for `llp curves`",
            exists=True,
            dir_okay=False,
        ),
    ],
    scheduler: Annotated[
        list[str] | None,
        typer.Option(
            "--scheduler",
            metavar="NAME",
            help="may be repeated or a list with commas; NAME_cold restarts at every rung; "
            "`--scheduler list` names all",
            show_default=f"{DEFAULT},freeze_thaw",
        ),
    ] = None,
    budget: Annotated[float, typer.Option(help="full trainings of each search")] = 20.0,
    workers: Annotated[int, typer.Option(help="of the virtual clock", min=1)] = 1,
    seeds: Annotated[int, typer.Option(help="searches of each method on each task", min=1)] = 10,
    trials: Annotated[int, typer.Option(help="configurations a search may use", min=1)] = 80,
    reduction_factor: Annotated[int, typer.Option(help="eta", min=2)] = 3,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="of our schedulers that know it"),
    ] = None,
    prior: Annotated[
        Path | None,
        typer.Option(help="prior of learning curves; default: the shipped one", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="folder for regret.parquet and regret.png", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Search tabulated trainings with many schedulers on a virtual clock, and compare them.

    The decisions are those of a real search: the same code, with a table in place of the training.
    `match` is the cost in full trainings after which a method is as good as random search at the
    end of the budget. Tables that the prior was fitted on flatter freeze_thaw: refit the prior
    without them (`llp curves fit`) and give it with --prior.
    """
    from llp.probing.curve_prior import load
    from llp.simulation import outcome, study, tasks

    if not budget > 0 or not math.isfinite(budget):
        raise SpecError(f"--budget must be above 0, not {budget:g}")
    names = [part for text in scheduler or [f"{DEFAULT},freeze_thaw"] for part in text.split(",")]
    if "list" in names:
        for name, about in study.methods().items():
            typer.echo(f"{name:<22} {about}")
        return
    for name in names:
        study.check_method(name)
    given = _options(option or [])
    study.check_options(names, given)
    if out is not None:
        make_folder(out)
    options = study.Options(
        budget, workers, trials, seeds, reduction_factor, scheduler_options=given
    )
    fitted = load(prior) if prior is not None else None
    read = tasks.read_tasks(tables)
    options = study.capped(options, read)
    if options.budget < budget:
        say(f"budget {options.budget:g}: all trials trained fully cost no more")
    found = study.simulate(
        read,
        list(dict.fromkeys(names)),
        options,
        priors=lambda task: fitted,
    )
    rows = outcome.summary(found, options)
    if out is not None:
        outcome.frame(found, options).to_parquet(out / "regret.parquet")
        outcome.picture(found, options, out / "regret.png")
    if json:
        for row in rows:
            emit({"event": "method", **asdict(row)})
        return
    typer.echo(
        f"{'scheduler':<22} {'match':>7} {'regret':>8} {'/random':>8} {'worst':>7} {'trials':>7}"
    )
    for row in rows:
        typer.echo(
            f"{row.method:<22} {_cost(row.match):>7} {row.final:>8.4f} "
            f"{_cost(row.against_random):>8} {_cost(row.worst_task):>7} {row.trials:>7.1f}"
        )
    if not {"random", "fifo"} & set(names):
        say("match, /random and worst compare with random search, which is not among them")
    elif any(math.isnan(row.against_random) for row in rows):
        say("/random has no value: random search ends with no regret to speak of")
    if out is not None:
        say(f"curves: {out / 'regret.parquet'}, {out / 'regret.png'}")


def _cost(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "never" if math.isinf(value) else f"{value:.2f}"


def _options(given: list[str]) -> dict[str, float | int | str]:
    found: dict[str, float | int | str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise SpecError(f"--option wants KEY=VALUE, not '{text}'")
        try:
            number = float(value)
            found[key] = int(number) if number == int(number) and "." not in value else number
        except ValueError:
            found[key] = value
    return found
