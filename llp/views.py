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


