"""`llp landscape`: the landscape of a trial, of a checkpoint, or of a training that is run first.

As in `cli`, the command parses, calls one function and prints. Every option is short for a value of
a landscape file (`llp.spec.landscape`); options win over the file, and `--set` over both.
"""

from __future__ import annotations

import json as text
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llp.shell import Json, Quiet, Set, emit, say

if TYPE_CHECKING:
    from llp.analysis import Outcome

Analyses = Annotated[
    str | None,
    typer.Option(
        "--only",
        metavar="A,B",
        help="these analyses only: `llp list analyses`",
        show_default=False,
    ),
]


def landscape(
    file: Annotated[
        str | None,
        typer.Argument(metavar="[FILE]", help="landscape file with settings", show_default=False),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(help="of a trial of this study", rich_help_panel="Whose", show_default=False),
    ] = None,
    trial: Annotated[
        str | None,
        typer.Option(help="t007, best or winner", rich_help_panel="Whose", show_default="best"),
    ] = None,
    job: Annotated[
        str | None,
        typer.Option(help="exactly this job: t007-r2", rich_help_panel="Whose", show_default=False),
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(
            help="folder that holds the study folders",
            rich_help_panel="Whose",
            show_default="llp_studies",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="of these weights", rich_help_panel="Whose", show_default=False),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="of a training, run now", rich_help_panel="Whose")
    ] = False,
    other: Annotated[
        Path | None,
        typer.Option(
            help="weights of an independent training, for connectivity",
            rich_help_panel="Whose",
            show_default=False,
        ),
    ] = None,
    earlier: Annotated[
        list[Path] | None,
        typer.Option(
            "--earlier",
            metavar="FILE",
            help="earlier weights of the same training, in order; repeatable",
            rich_help_panel="Whose",
            show_default=False,
        ),
    ] = None,
    runs: Annotated[
        int | None,
        typer.Option(
            "--runs",
            help="with --train: 2 trains a second seed, for connectivity",
            rich_help_panel="Whose",
            show_default="1",
        ),
    ] = None,
    experiment: Annotated[
        str | None,
        typer.Option(
            help="experiment file with dataset, model, training",
            rich_help_panel="Experiment",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="`llp list datasets`", rich_help_panel="Experiment", show_default=False),
    ] = None,
    data_root: Annotated[
        str | None,
        typer.Option(help="folder of its files", rich_help_panel="Experiment", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="`llp list models`", rich_help_panel="Experiment", show_default=False),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="of the training", rich_help_panel="Experiment", show_default=False),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="of the training", rich_help_panel="Experiment", show_default=False),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="of the training", rich_help_panel="Experiment", show_default=False),
    ] = None,
    only: Analyses = None,
    without: Annotated[
        str | None,
        typer.Option("--without", metavar="A,B", help="not these analyses", show_default=False),
    ] = None,
    directions: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="planes: random, hessian, hessian_signed, adam, trajectory, random_base",
            show_default=False,
        ),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="points along each direction", show_default="25")
    ] = None,
    extent: Annotated[
        float | None, typer.Option(help="half-width of planes and lines", show_default="1")
    ] = None,
    coarse: Annotated[
        int | None,
        typer.Option(help="points evaluated along each, others interpolated", show_default=False),
    ] = None,
    normalization: Annotated[
        str | None,
        typer.Option(help="of random directions: none, weight, filter, layer, model"),
    ] = None,
    robust: Annotated[
        bool, typer.Option("--robust", help="the first plane with its robust loss as well")
    ] = False,
    loss_cap: Annotated[
        float | None, typer.Option(help="pictures show losses up to here", show_default=False)
    ] = None,
    eigenvalues: Annotated[
        int | None, typer.Option(help="of the Hessian, largest by size", show_default="5")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="relative error of eigenvalues", show_default="0.001")
    ] = None,
    examples: Annotated[
        int | None, typer.Option("--examples", help="measured on", show_default="1024")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="examples at once", show_default="256")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train or validation", show_default="train")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="of directions and probes", show_default="0")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:1", show_default="auto")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="evaluate points in so many Ray workers", show_default="this process"),
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="of each; a fraction shares one", show_default="0")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster of the workers", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="results folder; default: landscape/TRIAL in the study, or llp_landscapes",
            show_default=False,
        ),
    ] = None,
    pictures: Annotated[
        str | None,
        typer.Option(metavar="KINDS", help="png, svg, both or none", show_default="both"),
    ] = None,
    override: Set = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look at the loss landscape of a trial, a checkpoint or a training.

    What is done is kept: the same command goes on after Ctrl-C, and a changed option redoes only
    what it affects.
    """
    from llp.analysis import analyse
    from llp.landscape_progress import Progress
    from llp.spec.landscape import load_landscape

    given: dict[str, Any] = {
        "experiment": experiment,
        "experiment.dataset.name": dataset,
        "experiment.dataset.root": data_root,
        "experiment.model.name": model,
        "experiment.training.epochs": epochs,
        "experiment.training.learning_rate": learning_rate,
        "experiment.training.optimizer": optimizer,
        "source.study": study,
        "source.trial": trial,
        "source.job": job,
        "source.root": root,
        "source.checkpoint": _path(checkpoint),
        "source.train": train or None,
        "source.other": _path(other),
        "source.checkpoints": [str(path) for path in earlier] if earlier else None,
        "source.num_runs": runs,
        "surfaces.directions": _names(directions),
        "surfaces.resolution": resolution,
        "surfaces.extent": extent,
        "lines.extent": extent,
        "surfaces.coarse": coarse,
        "surfaces.loss_cap": loss_cap,
        "directions.normalization": normalization,
        "spectrum.num_eigenvalues": eigenvalues,
        "spectrum.tolerance": tolerance,
        "data.num_examples": examples,
        "data.batch_size": batch_size,
        "data.split": split,
        "seed": seed,
        "device": device,
        "workers.num_workers": workers,
        "workers.gpus_per_worker": gpus_per_worker,
        "workers.address": address,
        "output.folder": _path(out),
        "output.pictures": _kinds(pictures),
        "analyses": _chosen(only, without),
    }
    overrides = [f"{key}={text.dumps(value)}" for key, value in given.items() if value is not None]
    if robust:
        first = (_names(directions) or ["random"])[0]
        overrides.append(f"surfaces.robust={text.dumps([first])}")
    spec = load_landscape(file, [*overrides, *(override or ())])
    shown = Progress(json=json, quiet=quiet)
    try:
        outcome = analyse(spec, on_event=shown, command=shlex.join(["llp", *sys.argv[1:]]))
    except KeyboardInterrupt:
        shown.close()
        say("interrupted; every finished part is saved, the same command goes on")
        raise typer.Exit(130) from None
    finally:
        shown.close()
    _tell(outcome, json=json)


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _names(listed: str | None) -> list[str] | None:
    return None if listed is None else [name.strip() for name in listed.split(",") if name.strip()]


def _kinds(pictures: str | None) -> list[str] | None:
    if pictures is None:
        return None
    return {"both": ["png", "svg"], "none": []}.get(pictures, _names(pictures) or [])


def _chosen(only: str | None, without: str | None) -> list[str] | None:
    """The list of analyses that `--only` and `--without` mean."""
    if only is None and without is None:
        return None
    from llp.spec.landscape import LandscapeSpec

    names = _names(only)
    if names is None:
        names = list(LandscapeSpec.model_fields["analyses"].default)
    left_out = _names(without) or []
    unknown = [name for name in left_out if name not in names]
    return [*(name for name in names if name not in left_out), *unknown]


def _tell(outcome: Outcome, *, json: bool) -> None:
    """What came of it: the few numbers that say most, what is missing, where to look."""
    if json:
        emit(
            {
                "event": "result",
                "folder": str(outcome.folder),
                "values": outcome.values,
                "missing": outcome.missing,
                "computed": outcome.computed,
                "kept": outcome.kept,
            }
        )
        return
    from llp.reporting import formats

    for key, label in (
        ("spectrum/largest", "largest eigenvalue"),
        ("spectrum/smallest", "smallest eigenvalue"),
        ("spectrum/trace", "trace"),
        ("sharpness/sam", "SAM sharpness"),
        ("sharpness/asam", "ASAM sharpness"),
        ("connectivity/linear/barrier", "barrier, straight"),
        ("connectivity/curve/barrier", "barrier, curve"),
    ):
        if formats.is_number(outcome.values.get(key)):
            error = outcome.values.get(
                f"{key}_standard_error", outcome.values.get(f"{key}/standard_error")
            )
            about = f" ± {formats.number(error, 2)}" if formats.is_number(error) else ""
            typer.echo(f"{label:20} {formats.number(outcome.values[key])}{about}")
    for name, why in outcome.missing.items():
        say(f"not made: {name}: {why}")
    typer.echo(f"{'results':20} {outcome.folder / 'landscape.json'}")
    if outcome.page is not None:
        typer.echo(f"{'page':20} {outcome.page}")
