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


def _console(*, stderr: bool = False) -> Console:
    """A console that breaks lines only on a terminal; piped output keeps its lines whole."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 10_000, highlight=False)


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _lines(out: Console, *lines: str, style: str = "") -> None:
    from rich.text import Text

    from llp.progress import printable

    for line in lines:
        out.print(Text(printable(line)), style=style, soft_wrap=True)


def _row(table: Table, *cells: object) -> None:
    from llp.progress import printable

    table.add_row(*map(printable, cells))


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


def _show_plan(plan: Any, spec: Spec, *, json: bool, report: Any = None) -> None:
    """The rungs with their images, epochs and cost, and what all of it comes to."""
    from llp.progress import write_line
    from llp.reporting import formats

    if json:
        checked = {"check": report} if report is not None else {"plan": plan}
        write_line(sys.stdout, {"event": "plan", "name": spec.name, **checked})
        return
    out = _console()
    table = _table("rung", "data", "images", "epochs", "trials", "samples")
    for rung in plan.rungs:
        jobs = plan.jobs_per_rung.get(rung.rung, 0)
        images, samples = formats.count(rung.num_examples), jobs * rung.samples_seen
        fraction = f"{100 * rung.data_fraction:.3g} %"
        _row(table, rung.rung, fraction, images, rung.epochs, jobs, formats.amount(samples))
    total = plan.samples_tier1 + plan.samples_verification
    share = 100 * total / max(plan.samples_full_search, 1)
    verification = spec.verification
    lines = [
        f"tier 1        {formats.amount(plan.samples_tier1)} samples when nothing is stopped early",
        f"verification  {formats.amount(plan.samples_verification)} samples: "
        f"{verification.top_k} configurations x {verification.num_seeds} seeds, in full",
        f"in all        {formats.amount(total)} samples, {share:.3g} % of the "
        f"{formats.amount(plan.samples_full_search)} it takes to train all "
        f"{spec.tier1.num_trials} configurations fully",
    ]
    if report is not None:
        batch = spec.training.batch_size
        work = formats.duration(total / batch * report.batch_seconds)
        lines += [
            f"one batch     {report.batch_seconds:.3g} s for {batch} images and "
            f"{formats.count(report.model_parameters)} parameters; at the pace of this first one "
            f"all would be {work} of one worker",
            "the file is good",
        ]
    _lines(
        out,
        f"{spec.name}: {formats.count(plan.num_train)} training, "
        f"{formats.count(plan.num_validation)} validation and {formats.count(plan.num_test)} test "
        f"images in {plan.num_classes} classes",
    )
    out.print(table)
    _lines(out, *lines)


def _show_summary(result: SearchResult, folder: Path, out: Console) -> None:
    """The answer: winner, how sure, what it cost, and where to look and go next."""
    from llp.reporting import formats, yaml_text
    from llp.tracking import links

    cost = result.cost
    spent = cost.tier1 + cost.tier2 + cost.verification
    facts: list[tuple[str, str]] = []
    if result.winner:
        config = next(t.trial for t in result.trials if t.trial.trial_id == result.winner)
        _lines(out, f"winner {result.winner}", style="bold green")
        _lines(out, *(f"  {line}" for line in yaml_text.dump(config.hyperparameters).splitlines()))
        facts += [("accuracy", _verified(result, result.winner))]
        labels = ["how sure", *[""] * 9]
        facts += list(zip(labels, _how_sure(result), strict=False))
    if result.score_report and result.score_report.sentence:
        facts += [("tier 2", result.score_report.sentence)]
    times = f" ({cost.full_search / spent:.1f} times as many)" if spent else ""
    facts += [
        (
            "cost",
            f"{formats.amount(spent)} samples in {formats.duration(sum(cost.seconds.values()))}; "
            f"training all {len(result.trials)} fully: {formats.amount(cost.full_search)}{times}",
        )
    ]
    table = _table("", "")
    table.show_header = False
    for fact in facts:
        _row(table, *fact)
    out.print(table)
    page, name = folder / "report.html", shlex.quote(str(folder))
    if page.is_file():
        _lines(out, f"report    {page}")
    tracking = result.spec.get("tracking")
    if isinstance(tracking, Mapping) and tracking.get("mlflow"):
        _lines(out, f"mlflow    {links.study_link(folder) or f'llp ui {name}'}")
    _lines(out, f"more      llp show {name} best")


def _verified(result: SearchResult, trial_id: str) -> str:
    from llp.reporting import formats

    runs = [run for run in result.verifications if run.trial_id == trial_id]
    if not runs:
        return "not verified"
    values = [run.test_accuracy for run in runs]
    mean = sum(values) / len(values)
    num = runs[0].num_test_examples
    sampling = 1.96 * (max(mean * (1 - mean), 0) / max(num, 1)) ** 0.5
    seeds = ", ".join(f"seed {run.seed}: {formats.percent(run.test_accuracy)}" for run in runs)
    return (
        f"{formats.percent(mean)} on the test images, {formats.plural(len(runs), 'full training')} "
        f"({seeds}); {formats.count(num)} test images pin it down to "
        f"±{100 * sampling:.1f} points"
    )


def _how_sure(result: SearchResult) -> Iterable[str]:
    from llp.reporting import formats

    if result.winner_reason:
        yield result.winner_reason
    report = result.score_report
    if report is None:
        return
    for score in report.scores:
        if score.trial_id == result.winner:
            chance = formats.probability(score.probability_best)
            yield (
                f"score {formats.number(score.value)} ({_span(score.interval)}), "
                f"{chance} likely the best before verification"
            )
    for tie in report.ties:
        if result.winner in tie:
            yield f"cannot be told apart by score: {', '.join(tie)}"


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


def _show_trial(about: Mapping[str, Any], out: Console) -> None:
    from llp.reporting import formats, yaml_text

    trial = about["trial"]
    ending = f", {trial.stopped_by}" if trial.stopped_by else ""
    head = f"{about['trial_id']}  {trial.outcome.replace('_', ' ')}{ending}"
    _lines(out, head, style="bold")
    _lines(
        out,
        f"seed {trial.trial.seed}, {formats.amount(trial.samples_seen)} samples, "
        f"{formats.duration(trial.seconds)}" + (", the winner" if about["winner"] else ""),
        *(f"  {line}" for line in yaml_text.dump(trial.trial.hyperparameters).splitlines()),
    )
    if trial.failure:
        _lines(out, "failure", style="bold")
        _lines(out, *(f"  {line}" for line in trial.failure.strip().splitlines()))
    _lines(out, "curves", style="bold")
    table = _table("rung", "data", "epoch", "samples", "train loss", "val. loss", "val. accuracy")
    for curve in trial.curves:
        for point in curve.points:
            _row(
                table,
                curve.rung,
                f"{100 * point.data_fraction:.3g} %",
                point.epoch,
                formats.count(point.samples_seen),
                formats.number(point.train_loss),
                formats.number(point.validation_loss),
                formats.percent(point.validation_accuracy),
            )
    out.print(table)
    _lines(out, "decisions", style="bold")
    _lines(out, *(f"  {d.kind:7} rung {d.rung}  {d.reason}" for d in about["decisions"]))
    if about["profile"]:
        _lines(out, "landscape", style="bold")
        table = _table("measurement", "value", "standard error", "examples", "cost", "note")
        for m in about["profile"].measurements:
            value, error = formats.number(m.value), formats.number(m.standard_error)
            cost = formats.duration(m.seconds)
            _row(table, m.name, value, error, formats.count(m.num_examples), cost, m.note)
        out.print(table)
    if about["score"]:
        score = about["score"]
        head = f"score {formats.number(score.value)} ({_span(score.interval)}), {score.preset}"
        _lines(out, head, style="bold")
        terms = score.contributions.items()
        _lines(out, *(f"  {formats.signed(addend, 4):>9}  {term}" for term, addend in terms))
        _lines(out, f"  the best with probability {formats.probability(score.probability_best)}")
    if about["verifications"]:
        _lines(out, "verified", style="bold")
    for run in about["verifications"]:
        test, validation = map(formats.percent, (run.test_accuracy, run.validation_accuracy))
        _lines(
            out,
            f"  seed {run.seed}: test accuracy {test}, validation {validation}, "
            f"{formats.duration(run.seconds)}",
        )


def _span(interval: Interval) -> str:
    from llp.reporting import formats

    low, high = formats.number(interval.low), formats.number(interval.high)
    return f"{low} to {high} with probability {100 * interval.level:.0f} %"


def main() -> None:
    """Entry point of the `llp` command."""
    app()


if __name__ == "__main__":
    main()
