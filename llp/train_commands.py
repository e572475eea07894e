"""`llp train`: one configuration, trained fully.

As in `cli`, the command parses, calls one function and prints. Every option is short for a value of
the file (`llp.spec.single`); options win over the file, and `--set` over both.
"""

from __future__ import annotations

import json as text
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llp.errors import TrackingError
from llp.shell import ROOT, Json, Quiet, emit, say

if TYPE_CHECKING:
    from llp.full_training import TrainingResult

WHAT, RECIPE, RUN = "What", "Recipe", "Run"


def _option(help: str, panel: str, *names: str, default: str | bool = False) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=default)


def train(
    file: Annotated[
        str | None,
        typer.Argument(metavar="[FILE]", help="file of one training", show_default=False),
    ] = None,
    dataset: Annotated[str | None, _option("`llp list datasets`", WHAT)] = None,
    data_root: Annotated[str | None, _option("folder of its files", WHAT)] = None,
    download: Annotated[
        bool | None, _option("let torchvision download it", WHAT, "--download")
    ] = None,
    model: Annotated[str | None, _option("`llp list models`", WHAT)] = None,
    from_study: Annotated[
        str | None, _option("a trial of this study", WHAT, "--from", default=False)
    ] = None,
    trial: Annotated[
        str | None, _option("t007, best or winner, with --from", WHAT, "--trial", default="best")
    ] = None,
    optimizer: Annotated[
        str | None, _option("`llp list optimizers`", RECIPE, default="sgd")
    ] = None,
    epochs: Annotated[int | None, _option("full passes", RECIPE, default="20")] = None,
    batch_size: Annotated[int | None, _option("images a step", RECIPE, default="128")] = None,
    learning_rate: Annotated[
        float | None,
        _option("highest of the schedule", RECIPE, "--learning-rate", "--lr", default="0.1"),
    ] = None,
    weight_decay: Annotated[
        float | None, _option("L2, or decoupled", RECIPE, default="0.0005")
    ] = None,
    momentum: Annotated[float | None, _option("of an optimizer that has it", RECIPE)] = None,
    schedule: Annotated[str | None, _option("`llp list schedules`", RECIPE, default="cosine")] = (
        None
    ),
    warmup_fraction: Annotated[
        float | None, _option("share of the steps", RECIPE, default="0.05")
    ] = None,
    augmentation: Annotated[
        str | None, _option("flip+crop+cutout, or none", RECIPE, default="none")
    ] = None,
    label_smoothing: Annotated[
        float | None,
        _option("in [0, 1)", RECIPE, default="0"),
    ] = None,
    gradient_clip: Annotated[
        float | None, _option("largest gradient norm", RECIPE, default="none")
    ] = None,
    averaging: Annotated[
        str | None, _option("`llp list averagings`", RECIPE, default="none")
    ] = None,
    precision: Annotated[
        str | None, _option("float32, bf16 or fp16", RECIPE, default="float32")
    ] = None,
    compile: Annotated[bool | None, _option("torch.compile the model", RECIPE, "--compile")] = None,
    seed: Annotated[int | None, _option("of everything random", RUN, default="0")] = None,
    seeds: Annotated[
        int | None, _option("trainings, each with its own", RUN, "--seeds", default="1")
    ] = None,
    best_weights: Annotated[
        str,
        _option(
            "weights of the best epoch: keep beside the last, use instead of them, or off",
            RUN,
            "--best-weights",
            default="keep",
        ),
    ] = "",
    checkpoint_every: Annotated[
        int | None, _option("epochs between kept weights", RUN, default="none")
    ] = None,
    test: Annotated[
        bool,
        _option("read the test split, once, at the end", RUN, "--test/--no-test", default=True),
    ] = True,
    device: Annotated[
        str, _option("auto, cpu, cuda, cuda:1", RUN, "--device", default="auto")
    ] = "auto",
    threads: Annotated[int | None, _option("CPU threads", RUN, default="torch's")] = None,
    snapshot_seconds: Annotated[
        float, _option("between snapshots, to go on from", RUN, default="30")
    ] = 30.0,
    study: Annotated[str | None, _option("name of the folder", RUN, "--study")] = None,
    root: Annotated[
        str | None, _option("folder that holds the study folders", RUN, default=ROOT)
    ] = None,
    mlflow: Annotated[
        bool | None, _option("show it in MLflow", RUN, "--mlflow/--no-mlflow", default="mlflow")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="any other value: rho=0.1, width=32, training.compile=true; repeatable",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the training as a file and stop")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train one configuration fully: from options, from a file, or from a trial of a study.

    The same command goes on after Ctrl-C or a kill, to the same bits; a finished one it reads.
    """
    from llp.full_training import train as run

    given: dict[str, Any] = {
        "dataset": dataset,
        "data_root": data_root,
        "dataset.download": download,
        "model": model,
        "optimizer": optimizer,
        "averaging": averaging,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "schedule": schedule,
        "warmup_fraction": warmup_fraction,
        "augmentation": augmentation,
        "label_smoothing": label_smoothing,
        "gradient_clip": gradient_clip,
        "precision": precision,
        "compile": compile,
        "seed": seed,
        "seeds": seeds,
        "best_weights": best_weights or None,
        "root": root,
        "mlflow": mlflow,
    }
    overrides = [
        f"{name}={text.dumps(value)}" for name, value in given.items() if value is not None
    ]
    spec = _spec(file, from_study, trial, root, [*overrides, *(override or ())])
    spec = _completed(spec, best_given=bool(best_weights), checkpoint_every=checkpoint_every)
    if dry_run:
        from llp.spec.single import to_training_yaml

        typer.echo(to_training_yaml(spec), nl=False)
        return
    _run(
        lambda on_event: run(
            spec,
            study_id=study,
            test=test,
            device=None if device == "auto" else device,
            threads=threads,
            snapshot_seconds=snapshot_seconds,
            on_event=on_event,
            command=_command(),
        ),
        mlflow=spec.tracking.mlflow,
        json=json,
        quiet=quiet,
    )


def is_training(folder: Path) -> bool:
    """Whether the study in `folder` is a training of its own."""
    from llp.tracking.ledger import study_header

    return bool(study_header(folder).get("kind") == "training")


def resume_here(folder: Path, *, json: bool, quiet: bool) -> None:
    """`llp resume` for a training."""
    from llp.full_training import resume
    from llp.tracking.ledger import study_header

    tracking = study_header(folder)["spec"].get("tracking") or {}
    _run(
        lambda on_event: resume(folder, on_event=on_event, command=_command()),
        mlflow=bool(tracking.get("mlflow")),
        json=json,
        quiet=quiet,
    )


def report_here(folder: Path) -> Path:
    """`llp report` for a training: writes its results and pages again."""
    from llp.full_training import write_results

    write_results(folder)
    return folder / "report.html"


def _spec(
    file: str | None,
    from_study: str | None,
    trial: str | None,
    root: str | None,
    overrides: list[str],
) -> Any:
    from llp.spec.single import load_training

    if from_study is None:
        if trial is not None:
            raise typer.BadParameter("name its study with --from", param_hint="--trial")
        return load_training(file, overrides)
    if file is not None:
        raise typer.BadParameter("a file and --from at once; choose one", param_hint="--from")
    from llp.full_training import from_trial
    from llp.tracking.ledger import find_study

    return from_trial(find_study(root or ROOT, from_study), trial or "best", overrides)


def _completed(spec: Any, *, best_given: bool, checkpoint_every: int | None) -> Any:
    """What the command line does by default and a file does not: it keeps the best weights."""
    changes: dict[str, Any] = {}
    if not best_given and "best_weights" not in spec.training.model_fields_set:
        changes["best_weights"] = "keep"
    if checkpoint_every is not None:
        others = [row for row in spec.training.callbacks if row["name"] != "checkpoints"]
        row = {"name": "checkpoints", "every": checkpoint_every, "optimizer": True}
        changes["callbacks"] = [*others, row]
    training = spec.training.model_copy(update=changes)
    return spec.model_copy(update={"training": training})


def _run(
    call: Callable[[Callable[[Mapping[str, Any]], None]], TrainingResult],
    *,
    mlflow: bool,
    json: bool,
    quiet: bool,
) -> None:
    from llp.tracking import links

    shown = Progress(json=json, quiet=quiet)
    try:
        result = call(shown)
    except KeyboardInterrupt:
        shown.close()
        say("interrupted; the same command goes on from the last snapshot")
        raise typer.Exit(130) from None
    finally:
        shown.close()
    _tell(result, json=json)
    shipped = links.read_state(Path(result.folder))
    if mlflow and not (shipped and shipped.complete):
        raise TrackingError(
            "the training is done, but MLflow has not received all of it; see "
            f"{Path(result.folder) / 'mlflow.log'}, then run: llp sync {shlex.quote(result.folder)}"
        )


def _tell(result: TrainingResult, *, json: bool) -> None:
    """What came of it, on standard output."""
    if json:
        emit({"event": "result", "result": result})
        return
    from llp.reporting import formats

    for name, label in (("test_accuracy", "test"), ("validation_accuracy", "validation")):
        mean, error = result.mean(name)
        if formats.is_number(mean):
            about = f" ± {formats.points(error, 2)}" if formats.is_number(error) else ""
            typer.echo(f"{label:11} {formats.points(mean, 2)}{about} %".replace(formats.NBSP, " "))
    for each in result.seeds:
        line = f"seed {each.seed}: {each.outcome.replace('_', ' ')}"
        if each.curve:
            line += (
                f", epoch {each.epoch}, best epoch {each.best_epoch}, "
                f"{formats.duration(each.seconds)}, {each.checkpoint or 'no weights'}"
            )
        typer.echo(line.replace(formats.NBSP, " "))
    typer.echo(f"{'results':11} {Path(result.folder) / 'training.json'}")
    page = Path(result.folder) / "report.html"
    if page.is_file():
        typer.echo(f"{'page':11} {page}")


class Progress:
    """What is said while it trains: a line an epoch, on a terminal written over."""

    def __init__(self, *, json: bool, quiet: bool) -> None:
        self._json, self._quiet = json, quiet
        self._live = sys.stderr.isatty() and not quiet
        self._open = False
        self._jobs: dict[str, Mapping[str, Any]] = {}
        self._total = 1
        self._last = 0.0

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Takes in one event of the ledger."""
        if self._json:
            emit(event)
        if self._quiet:
            return
        kind = event["event"]
        if kind == "study":
            self._total = int(event["spec"]["verification"]["num_seeds"])
            say(f"{event['study_id']}: {event['num_train']:,} training images")
        elif kind == "job":
            self._jobs[event["job"]["job_id"]] = event["job"]
        elif kind == "point":
            self._point(event)
        elif kind == "job_end":
            self._end(event["end"])

    def _point(self, event: Mapping[str, Any]) -> None:
        point, job = event["point"], self._jobs[event["job_id"]]
        epochs = job["rung"]["epochs"]
        line = (
            f"{self._which(event['job_id'])}epoch {point['epoch']} of {epochs}: training loss "
            f"{point['train_loss']:.4g}, validation accuracy "
            f"{100 * point['validation_accuracy']:.2f} %"
        )
        now = time.monotonic()
        if self._live:
            sys.stderr.write(f"\r\x1b[K{line[:110]}")
            sys.stderr.flush()
            self._open = True
        elif now >= self._last + 1.0 or point["epoch"] == epochs:
            say(line)
            self._last = now

    def _which(self, job_id: str) -> str:
        number = list(self._jobs).index(job_id) + 1
        return f"seed {number} of {self._total}, " if self._total > 1 else ""

    def _end(self, end: Mapping[str, Any]) -> None:
        self.close()
        if end["outcome"] != "completed":
            lines = str(end["failure"]).strip().splitlines()
            which = self._which(end["job_id"])
            say(f"{which}{end['outcome'].replace('_', ' ')}: {lines[-1] if lines else ''}")

    def close(self) -> None:
        """Ends a line that is written over."""
        if self._open:
            sys.stderr.write("\n")
            sys.stderr.flush()
            self._open = False


def _command() -> str:
    return shlex.join(["llp", *sys.argv[1:]])
