"""The command line: every command parses, calls one function of the service, and prints.

Standard output carries the answer (JSON lines with `--json`), standard error what is said along the
way. Nothing heavy is imported before a command runs, so that `llp --help` is instant; a test looks.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llp import (
    __version__,
    batch_command,
    cluster_commands,
    curve_commands,
    evidence_command,
    landscape_commands,
    score_commands,
    simulate_command,
    train_commands,
)
from llp.cluster_commands import Follow, Insecure, StartTimeout, WorkingDir
from llp.errors import (
    EnvironmentProblem,
    LlpError,
    NoTrialSucceeded,
    SpecError,
    StudyError,
    TrackingError,
)
from llp.shell import EPILOG, ROOT, Commands, File, Json, Quiet, Root, Set, Study, emit, say

if TYPE_CHECKING:
    from llp.display import Reporter
    from llp.records import SearchResult
    from llp.spec.schema import Spec

app = typer.Typer(
    name="llp",
    cls=Commands,
    help="Finds good hyperparameters at a fraction of the cost of full training, and shows why.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"llp {__version__}")
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
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the study if it exists")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
) -> None:
    """Search from an experiment file to a verified winner."""
    from llp import pipeline, views

    spec = _load(file, override)
    if dry_run:
        plan = pipeline.plan(spec)
        if json:
            emit({"event": "plan", "name": spec.name, "plan": plan})
        else:
            views.show_plan(plan, spec, views.console())
        return
    _run(
        lambda on_event: pipeline.search(
            spec, study_id=study, resume=resume, on_event=on_event, command=_command()
        ),
        json=json,
        quiet=quiet,
        root=spec.output.root,
        mlflow=spec.tracking.mlflow,
    )


@app.command()
def check(file: File, override: Set = None, json: Json = False) -> None:
    """Validate an experiment, print its rungs and cost, and train one batch."""
    from llp import pipeline, views
    from llp.spec import notes

    spec = _load(file, override)
    report = pipeline.check(spec)
    if json:
        found = [str(note) for note in notes(spec)]
        emit({"event": "plan", "name": spec.name, "check": report, "notes": found})
    else:
        views.show_plan(report.plan, spec, views.console(), report)


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
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="URL",
            help="as a job of this cluster: its Ray dashboard, http://HOST:8265; default: here",
            show_default=False,
        ),
    ] = None,
    follow: Follow = False,
    working_dir: WorkingDir = None,
    start_timeout: StartTimeout = 600.0,
    insecure: Insecure = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go on with an interrupted study; nothing that finished runs again.

    With --address as a job of the cluster that sees the folder --root.
    """
    from llp import pipeline

    if address is not None:
        cluster_commands.resume_there(
            study,
            root,
            override or [],
            address=address,
            working_dir=working_dir,
            follow=follow,
            start_timeout=start_timeout,
            insecure=insecure,
            json=json,
        )
        return
    for option, given in (
        ("--follow", follow),
        ("--insecure", insecure),
        ("--working-dir", working_dir is not None),
        ("--start-timeout", start_timeout != 600.0),
    ):
        if given:
            raise SpecError(
                f"{option} is of a job of a cluster: it needs --address http://HOST:8265"
            )
    folder = _study(study, root, interrupted=True)
    if train_commands.is_training(folder):
        train_commands.resume_here(folder, json=json, quiet=quiet)
        return
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
    from llp import views
    from llp.display import Reporter
    from llp.tracking import ledger, links

    reporter = Reporter(
        console=views.console(stderr=True), machine=sys.stdout if json else None, quiet=quiet
    )
    late: TrackingError | None = None
    try:
        with reporter:
            result = call(reporter)
    except KeyboardInterrupt:
        say("interrupted; everything that finished is saved" + _resume_hint(reporter, root))
        raise typer.Exit(130) from None
    except TrackingError as error:
        if reporter.state.status != "finished":
            raise
        result, late = ledger.load_study(ledger.find_study(root, reporter.state.study_id)), error
    except LlpError:
        if reporter.state.study_id and reporter.state.status == "running":
            say("everything that finished is saved" + _resume_hint(reporter, root))
        raise
    if json:
        emit({"event": "result", "result": result})
    folder = ledger.find_study(root, result.study_id)
    views.show_summary(result, folder, views.console(stderr=json))
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


app.command()(train_commands.train)
app.command()(batch_command.batch)
app.command()(landscape_commands.landscape)
app.command()(cluster_commands.submit)
app.add_typer(cluster_commands.jobs)
app.add_typer(curve_commands.curves)
app.command()(evidence_command.study)
app.command()(score_commands.score)
app.command()(score_commands.calibrate)
app.command()(simulate_command.simulate)


# Looking


@app.command()
def status(study: Study = None, root: Root = ROOT, json: Json = False) -> None:
    """How far a study is, running or not."""
    from llp import display, views
    from llp.progress import ProgressState
    from llp.tracking import ledger, links

    folder = _study(study, root)
    state = ProgressState()
    for event in ledger.read_events(folder):
        state.update(event)
    state.status = ledger.load_study(folder).status
    if json:
        emit(display.facts(state))
        return
    shipped = links.read_state(folder)
    if state.mlflow:
        missing = f"has not received all of it: llp sync {shlex.quote(str(folder))}"
        state.mlflow = "" if shipped and shipped.complete else missing
    views.show_status(state, folder, views.console())
    if state.status == "interrupted":
        say(f"go on with: llp resume {shlex.quote(str(folder))}")


@app.command()
def show(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="[STUDY] TRIAL",
            help="a trial: t007, best or winner; before it a study, by default the newest",
        ),
    ],
    root: Root = ROOT,
    json: Json = False,
) -> None:
    """One trial: curves, measurements, contributions to its score, decisions and reasons."""
    from llp import views
    from llp.full_forecast import full_results
    from llp.tracking import ledger

    if len(names) > 2:
        raise typer.BadParameter("one study and one trial at most", param_hint="[STUDY] TRIAL")
    result = ledger.load_study(_study(names[0] if len(names) == 2 else None, root))
    about = views.about_trial(result, views.find_trial(result, names[-1]))
    about["full_training"] = full_results(result).get(about["trial_id"])
    if json:
        emit({"event": "show", **about})
    else:
        views.show_trial(about, views.console())


@app.command("list")
def list_(
    what: Annotated[
        Literal[
            "datasets",
            "models",
            "optimizers",
            "averagings",
            "metrics",
            "schedulers",
            "corruptions",
            "searchers",
            "proxies",
            "schedules",
            "stop_rules",
            "search_rules",
            "augmentations",
            "presets",
            "callbacks",
            "analyses",
            "sharpness_measures",
            "studies",
        ],
        typer.Argument(help="which table", show_default=False),
    ],
    root: Root = ROOT,
    json: Json = False,
) -> None:
    """The names a YAML file may use, with their options; or the studies so far."""
    from llp import registry, views

    if what == "studies":
        _list_studies(root, json=json)
        return
    entries = registry.entries(what)
    if not json:
        views.show_entries(what, entries, views.console())
        return
    for name, entry in entries.items():
        emit({"event": what, "name": name, "summary": entry.summary, "options": entry.options})


def _list_studies(root: str, *, json: bool) -> None:
    from llp import views
    from llp.tracking import ledger

    studies = ledger.list_studies(root)
    if json:
        for row in studies:
            emit({"event": "studies", **vars(row), "folder": str(row.folder)})
        return
    if not studies:
        say(f"no studies in {root} yet; `llp search` makes one")
        return
    views.show_studies(studies, views.console())
    for row in studies:
        if row.problem:
            say(f"{row.study_id}: {row.problem}")


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
    from llp import views

    spec = _load(file, override) if file else None
    counts = Counter[str]()
    out = views.console()
    for check in checks.examine(Path(spec.output.root if spec else root), spec):
        counts[check.status] += 1
        if json:
            emit({"event": "check", "check": check})
        else:
            views.show_check(check, out)
    if counts["fail"]:
        raise EnvironmentProblem(
            f"{counts['fail']} of the checks failed; a search would not run here"
        )
    warned = f"; {counts['warn']} to look at" if counts["warn"] else ""
    say(f"a search can run here{warned}")


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
def report(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[STUDY|FILE]",
            help="a study (default: the newest), or the definition of a report matrix",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="run this configuration only; repeatable"),
    ] = None,
    render_only: Annotated[
        bool, typer.Option("--render-only", help="run nothing, write the pages")
    ] = False,
    override: Set = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="folder of the pages; default: reports/out/NAME"),
    ] = None,
    root: Root = ROOT,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the HTML page of a study again, or run a report matrix and write all its pages."""
    from llp.spec.matrix import is_definition

    if is_definition(what):
        from llp import matrix_command

        where = [] if root == ROOT else [f"output.root={root}"]
        matrix_command.report(
            str(what),
            only=only or (),
            render_only=render_only,
            overrides=[*where, *(override or ())],
            out=out,
            json=json,
            quiet=quiet,
            command=_command(),
        )
        return
    options: dict[str, object] = {"--only": only, "--render-only": render_only, "--set": override}
    options |= {"--out": out, "--json": json, "--quiet": quiet}
    if given := [name for name, value in options.items() if value]:
        raise typer.BadParameter(
            "for a report matrix (a .yaml file), and this is a study", param_hint=", ".join(given)
        )
    folder = _study(what, root)
    if train_commands.is_training(folder):
        typer.echo(train_commands.report_here(folder))
        return
    from llp import pipeline

    typer.echo(pipeline.report(folder))


@app.command()
def ui(
    study: Study = None,
    port: Annotated[int, typer.Option(help="port on the loopback interface")] = 5000,
    root: Root = ROOT,
) -> None:
    """Serve MLflow's page and print the link that shows the study's trials sorted and charted."""
    from llp.tracking import links, shipper, ui

    folder = _study(study, root, batches=True)
    uri, _ = shipper.tracking_target(folder)
    if links.read_state(folder) is None:
        say(f"MLflow has nothing of this study yet: llp sync {shlex.quote(str(folder))}")
    if links.is_server(uri):
        typer.echo(links.study_link(folder) or uri)
        return
    say("starting MLflow's page; on a busy machine this takes up to a minute")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the server as Ctrl-C does
    process = ui.start_ui(uri, port=port)
    try:
        base = ui.base_url("127.0.0.1", port)
        typer.echo(links.study_link(folder, base) or base)
        say("Ctrl-C ends it")
        process.wait()
    except KeyboardInterrupt:
        say("")
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

    folder = _study(study, root, batches=True)
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
    say(f"next: llp check {path}")


@app.command()
def schema(
    kind: Annotated[
        str,
        typer.Argument(help="experiment, or a command's: train, batch, report, study, landscape"),
    ] = "experiment",
) -> None:
    """Print the JSON Schema of a kind of file, for completion in an editor."""
    import json

    from llp.spec.file_schemas import file_schema

    typer.echo(json.dumps(file_schema(kind), indent=2, ensure_ascii=False, allow_nan=False))


# Helpers


def _load(file: str, overrides: list[str] | None) -> Spec:
    from llp.spec import load_spec

    return load_spec(file, overrides or ())


def _study(
    name: str | None, root: str, *, interrupted: bool = False, batches: bool = False
) -> Path:
    """The folder of the study called `name`, by default the one that was last at work.

    With `interrupted` one that can be resumed goes before those that cannot. Only with `batches`
    may it be a batch.
    """
    from llp.tracking import ledger

    if name is not None:
        folder = ledger.find_study(root, name)
        return folder if batches else ledger.no_batch(folder)
    studies = ledger.list_studies(root)
    if not studies:
        raise StudyError(f"no studies in {root} yet; `llp search` makes one")
    if interrupted:
        studies = [s for s in studies if s.status == "interrupted"] or studies
    folder = max(studies, key=lambda s: s.updated or s.started).folder
    return folder if batches else ledger.no_batch(folder)


def _command() -> str:
    return shlex.join(["llp", *sys.argv[1:]])


def main() -> None:
    """Entry point of the `llp` command; like `python -m`, it finds modules in the current folder.

    That is what makes `my_package:build_model` work from a project that is not installed. Ray does
    the same for the workers.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    app()


if __name__ == "__main__":
    main()
