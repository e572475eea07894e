"""The command line: every command parses, calls one function of the service, and prints.

Standard output carries the answer (JSON lines with `--json`), standard error what is said along the
way. Nothing heavy is imported before a command runs, so that `llp --help` is instant; a test looks.
"""

from __future__ import annotations

import errno
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from llp.errors import (
    EnvironmentProblem,
    LlpError,
    NoTrialSucceeded,
    SpecError,
    StudyError,
    TrackingError,
    unknown,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from llp.progress import Reporter
    from llp.records import Interval, SearchResult
    from llp.spec.schema import Spec

EPILOG = """Exit codes:
  0  done;
  1  a bug in llp;
  2  bad input: file, option or data;
  3  the search ended and no trial succeeded;
  4  the machine or the study folder does not allow it;
  5  the search is done but MLflow has not received all of it: llp sync;
130  interrupted, everything finished is saved: llp resume."""

BUG = "This is a bug in llp. Please report it with the lines above and the output of `llp doctor`."


class _Commands(TyperGroup):
    """Turns every way to fail into one message and a documented exit code."""

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.params.get("debug"))
        try:
            return super().invoke(ctx)
        except LlpError as error:
            if debug:
                traceback.print_exc()
            _explain(error)
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                error.add_note(BUG)
                raise
            _say(f"error: no space left on the disk ({error.filename or error}); what was finished")
            _say("is saved: free some space, then `llp resume`")
            raise typer.Exit(4) from error
        except Exception as error:
            error.add_note(BUG)
            raise


app = typer.Typer(
    name="llp",
    cls=_Commands,
    help="Finds good hyperparameters at a fraction of the cost of full training, and shows why.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

File = Annotated[str, typer.Argument(help="experiment file, or a name from search_spaces/")]
Study = Annotated[
    str | None, typer.Argument(help="study id or folder; default: the newest", show_default=False)
]
Root = Annotated[str, typer.Option("--root", help="folder that holds the study folders")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override one value; may be repeated"),
]
Json = Annotated[bool, typer.Option("--json", help="JSON lines on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, only the result")]
ROOT = "llp_studies"


def _version(value: bool) -> None:
    if value:
        typer.echo(f"llp {installed_version('llp')}")
        raise typer.Exit()


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="tracebacks for every error")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


# Searching


@app.command()
def search(
    file: File,
    override: Set = None,
    study: Annotated[
        str | None, typer.Option("--study", help="name of the study folder", show_default=False)
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
) -> None:
    """Search from an experiment file to a verified winner."""
    from llp import pipeline

    spec = _load(file, override)
    if dry_run:
        _show_plan(pipeline.plan(spec), spec, json=json)
        return
    _run(
        lambda on_event: pipeline.search(
            spec, study_id=study, on_event=on_event, command=_command()
        ),
        json=json,
        quiet=quiet,
        root=spec.output.root,
        mlflow=spec.tracking.mlflow,
    )


@app.command()
def check(file: File, override: Set = None, json: Json = False) -> None:
    """Validate an experiment, print its rungs and cost, and train one batch."""
    from llp import pipeline

    spec = _load(file, override)
    report = pipeline.check(spec)
    _show_plan(report.plan, spec, json=json, report=report)


@app.command()
def resume(
    study: Study = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="override resources, tracking or output; repeatable"
        ),
    ] = None,
    root: Root = ROOT,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go on with an interrupted study; nothing that finished runs again."""
    from llp import pipeline

    folder = _study(study, root)
    root = str(folder.parent)
    _run(
        lambda on_event: pipeline.resume(
            folder,
            root=root,
            overrides=override or (),
            on_event=on_event,
            command=_command(),
        ),
        json=json,
        quiet=quiet,
        root=root,
        mlflow=_uses_mlflow(folder, override or ()),
    )


def _run(
    call: Callable[[Callable[[Mapping[str, Any]], None]], SearchResult],
    *,
    json: bool,
    quiet: bool,
    root: str,
    mlflow: bool,
) -> None:
    """Runs a search under a display and prints what came of it."""
    from llp.progress import Reporter, write_line
    from llp.tracking import ledger, links

    reporter = Reporter(
        console=_console(stderr=True), machine=sys.stdout if json else None, quiet=quiet
    )
    late: TrackingError | None = None
    try:
        with reporter:
            result = call(reporter)
    except KeyboardInterrupt:
        _say("interrupted; everything that finished is saved" + _resume_hint(reporter, root))
        raise typer.Exit(130) from None
    except TrackingError as error:
        if reporter.state.status != "finished":
            raise
        result, late = ledger.load_study(ledger.find_study(root, reporter.state.study_id)), error
    except LlpError:
        if reporter.state.study_id and reporter.state.status == "running":
            _say("everything that finished is saved" + _resume_hint(reporter, root))
        raise
    if json:
        write_line(sys.stdout, {"event": "result", "result": result})
    folder = ledger.find_study(root, result.study_id)
    _show_summary(result, folder, _console(stderr=json))
    if result.winner is None:
        raise NoTrialSucceeded(f"no trial of {result.study_id} produced a usable result")
    if late:
        raise late
    shipped = links.read_state(folder)
    if mlflow and not (shipped and shipped.complete):
        raise TrackingError(
            "the search is done, but MLflow has not received all of it; see "
            f"{folder / 'mlflow.log'}, then run: llp sync {shlex.quote(str(folder))}"
        )


def _uses_mlflow(folder: Path, overrides: Iterable[str]) -> bool:
    from llp.tracking import ledger

    if any(override.startswith("tracking.mlflow=") for override in overrides):
        return False  # switched for this driver: what arrives is not ours to judge
    tracking = ledger.study_header(folder)["spec"].get("tracking") or {}
    return bool(tracking.get("mlflow"))


def _resume_hint(reporter: Reporter, root: str) -> str:
    if not reporter.state.study_id:
        return ""
    where = "" if root == ROOT else f" --root {shlex.quote(root)}"
    return f"; go on with:\n  llp resume {reporter.state.study_id}{where}"


# Looking


@app.command()
def status(study: Study = None, root: Root = ROOT, json: Json = False) -> None:
    """How far a study is, running or not."""
    from llp import progress
    from llp.tracking import ledger

    folder = _study(study, root)
    state = progress.ProgressState()
    for event in ledger.read_events(folder):
        state.update(event)
    state.status = ledger.load_study(folder).status
    if json:
        progress.write_line(sys.stdout, progress.facts(state))
        return
    _console().print(progress.block(state))
    if state.status == "interrupted":
        _say(f"go on with: llp resume {shlex.quote(str(folder))}")


@app.command()
def show(
    study: Annotated[str, typer.Argument(metavar="[STUDY]", help="default: the newest study")],
    trial: Annotated[
        str | None,
        typer.Argument(metavar="TRIAL", help="t007, or best, or winner", show_default=False),
    ] = None,
    root: Root = ROOT,
    json: Json = False,
) -> None:
    """One trial: curves, measurements, contributions to its score, decisions and reasons."""
    from llp.progress import write_line
    from llp.tracking import ledger

    name, wanted = (study, trial) if trial is not None else (None, study)
    result = ledger.load_study(_study(name, root))
    trial_id = _trial_id(result, wanted)
    if json:
        write_line(sys.stdout, {"event": "show", **_about(result, trial_id)})
        return
    _show_trial(_about(result, trial_id), _console())


@app.command("list")
def list_(
    what: Annotated[
        Literal[
            "datasets",
            "models",
            "optimizers",
            "metrics",
            "schedulers",
            "searchers",
            "schedules",
            "stop_rules",
            "augmentations",
            "presets",
            "studies",
        ],
        typer.Argument(help="which table", show_default=False),
    ],
    root: Root = ROOT,
    json: Json = False,
) -> None:
    """The names a YAML file may use, with their options; or the studies so far."""
    from llp import progress, registry
    from llp.reporting import formats
    from llp.tracking import ledger

    if what == "studies":
        studies = ledger.list_studies(root)
        if json:
            for row in studies:
                plain = vars(row) | {"folder": str(row.folder)}
                progress.write_line(sys.stdout, {"event": "studies", **plain})
            return
        if not studies:
            _say(f"no studies in {root} yet; `llp search` makes one")
        table = _table("study", "status", "trials", "winner", "last event")
        for row in studies:
            moment = formats.moment(row.updated or row.started)
            _row(table, row.study_id, row.status, str(row.num_trials), row.winner or "-", moment)
        _console().print(table)
        for row in studies:
            if row.problem:
                _say(f"{row.study_id}: {row.problem}")
        return
    table = _table("name", "what it is", "options")
    for name, entry in registry.entries(what).items():
        if json:
            row_ = {"event": what, "name": name, "summary": entry.summary, "options": entry.options}
            progress.write_line(sys.stdout, row_)
        _row(table, name, entry.summary, progress.settings(entry.options))
    if not json:
        _console().print(table)


@app.command()
def doctor(
    file: Annotated[
        str | None,
        typer.Argument(help="also look at what this experiment needs", show_default=False),
    ] = None,
    override: Set = None,
    root: Root = ROOT,
    json: Json = False,
) -> None:
    """What works on this machine, what does not, and what to do about it."""
    from llp import doctor as checks
    from llp.progress import printable, write_line

    spec = _load(file, override) if file else None
    out, failed = _console(), 0
    colour = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for check in checks.examine(Path(spec.output.root if spec else root), spec):
        failed += check.status == "fail"
        if json:
            write_line(sys.stdout, {"event": "check", "check": check})
            continue
        out.print(f"[{colour[check.status]}]{check.status:4}[/] {check.name:15} ", end="")
        out.print(printable(check.found), markup=False, highlight=False)
        if check.todo:
            out.print(f"     do: {printable(check.todo)}", markup=False, highlight=False)
    if failed:
        raise EnvironmentProblem(f"{failed} of the checks failed; a search would not run here")


# Using what was found


@app.command()
def export(
    study: Study = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="folder, or a file NAME.csv or NAME.parquet; default: in the study folder",
        ),
    ] = None,
    format: Annotated[Literal["parquet", "csv"], typer.Option("--format", "-f")] = "parquet",
    root: Root = ROOT,
) -> None:
    """Write all trials, curves and measurements as tables."""
    from llp.tracking import export as tables
    from llp.tracking import ledger

    folder = _study(study, root)
    for path in tables.write_export(ledger.load_study(folder), out or folder / "export", format):
        typer.echo(path)


@app.command()
def report(study: Study = None, root: Root = ROOT) -> None:
    """Write the HTML page of a study again and print where it is."""
    from llp import pipeline

    typer.echo(pipeline.report(_study(study, root)))


@app.command()
def ui(
    study: Study = None,
    port: Annotated[int, typer.Option(help="port on the loopback interface")] = 5000,
    root: Root = ROOT,
) -> None:
    """Serve MLflow's page and print the link that shows the study's trials sorted and charted."""
    from llp.tracking import links, shipper, ui

    folder = _study(study, root)
    uri, _ = shipper.tracking_target(folder)
    if links.read_state(folder) is None:
        _say(f"MLflow has nothing of this study yet: llp sync {shlex.quote(str(folder))}")
    if links.is_server(uri):
        typer.echo(links.study_link(folder) or uri)
        return
    _say("starting MLflow's page; on a busy machine this takes up to a minute")
    process = ui.start_ui(uri, port=port)
    try:
        base = ui.base_url("127.0.0.1", port)
        typer.echo(links.study_link(folder, base) or base)
        _say("Ctrl-C ends it")
        process.wait()
    except KeyboardInterrupt:
        _say("")
    finally:
        ui.stop_ui(process)


@app.command()
def sync(
    study: Study = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="write the study's MLflow runs afresh")
    ] = False,
    root: Root = ROOT,
) -> None:
    """Send to MLflow what it has not received; nothing is sent twice."""
    from llp.tracking import links, shipper

    folder = _study(study, root)
    shipped = shipper.ship(folder, rebuild=rebuild)
    typer.echo(
        f"{shipped.num_runs} runs with {shipped.num_events} events of {folder.name} are in "
        f"experiment {shipped.experiment} at {shipped.uri}"
    )
    typer.echo(links.study_link(folder) or f"look at them: llp ui {shlex.quote(str(folder))}")


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="name of the experiment and the file")] = "experiment",
    preset: Annotated[
        str | None, typer.Option(help="start from a file of search_spaces/", show_default=False)
    ] = None,
) -> None:
    """Write a commented experiment file to start from."""
    from llp.spec import init_template

    path = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    text = init_template(path.stem, preset)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise SpecError(f"{path} exists already and is left as it is; give another name") from None
    typer.echo(path)
    _say(f"next: llp check {path}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of experiment files, for completion in an editor."""
    import json

    from llp.spec import json_schema

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False, allow_nan=False))


# Helpers


def _load(file: str, overrides: list[str] | None) -> Spec:
    from llp.spec import load_spec

    return load_spec(file, overrides or ())


def _study(name: str | None, root: str) -> Path:
    """The folder of the study called `name`, by default the one that was last at work."""
    from llp.tracking import ledger

    if name is not None:
        return ledger.find_study(root, name)
    studies = ledger.list_studies(root)
    if not studies:
        raise StudyError(f"no studies in {root} yet; `llp search` makes one")
    return max(studies, key=lambda study: study.started).folder


def _trial_id(result: SearchResult, wanted: str) -> str:
    known = [trial.trial.trial_id for trial in result.trials]
    if wanted == "winner":
        if result.winner is None:
            raise StudyError(f"{result.study_id} has no winner yet; try `best`")
        return result.winner
    if wanted == "best":
        if result.winner is not None:
            return result.winner
        if result.score_report and result.score_report.scores:
            return result.score_report.scores[0].trial_id
        tops = {
            trial.trial.trial_id: trial.last.validation_accuracy
            for trial in result.trials
            if trial.last is not None and trial.outcome == "completed"
        }
        if not tops:
            raise StudyError(f"no trial of {result.study_id} has finished a rung yet")
        return max(tops, key=lambda trial_id: tops[trial_id])
    if wanted not in known:
        raise StudyError(
            f"{result.study_id}: {unknown('trial', wanted, [*known, 'best', 'winner'])}"
        )
    return wanted


def _say(text: str) -> None:
    from llp.progress import say

    say(sys.stderr, text)


def _command() -> str:
    return shlex.join(["llp", *sys.argv[1:]])


def _explain(error: LlpError) -> None:
    """The error in words; for a wrong file with the source line and a caret under the place."""
    if isinstance(error, SpecError):
        from llp.spec import render

        _say(render(error))
    else:
        _say(f"error: {error}")


def _about(result: SearchResult, trial_id: str) -> dict[str, Any]:
    """All that the study knows of one trial."""
    scores = result.score_report.scores if result.score_report else ()
    return {
        "study_id": result.study_id,
        "trial_id": trial_id,
        "winner": result.winner == trial_id,
        "rungs": result.rungs,
        "trial": next(t for t in result.trials if t.trial.trial_id == trial_id),
        "decisions": [d for d in result.decisions if d.trial_id == trial_id],
        "profile": next((p for p in result.profiles if p.trial_id == trial_id), None),
        "score": next((s for s in scores if s.trial_id == trial_id), None),
        "verifications": [v for v in result.verifications if v.trial_id == trial_id],
    }


def main() -> None:
    """Entry point of the `llp` command."""
    app()


if __name__ == "__main__":
    main()
