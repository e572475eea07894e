"""What the commands print on standard output: records of a study become tables and sentences.

`cli` finds what was asked for, `views` says it, `display` knows how a running search looks. Every
function here takes the console it prints to; none reads a file, but for the links of a summary.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llp.display import block, printable, put, settings
from llp.reporting import formats, yaml_text
from llp.reporting.earlier import about_earlier
from llp.reporting.study import Verified, verified
from llp.tracking.choice import find_trial as find_trial

if TYPE_CHECKING:
    from llp.doctor import Check
    from llp.pipeline import CheckReport, Plan
    from llp.progress import ProgressState
    from llp.records import Decision, GeneralizationScore, SearchResult, TieBreak, TieChoice
    from llp.registry import Entry
    from llp.spec.schema import Spec
    from llp.tracking.ledger import StudySummary

CURVE_POINTS = 5
"""Evaluations of a rung that `llp show` prints; JSON and `llp export` have all."""

PLACES = {
    "datasets": "dataset.name, or your own my_package:load",
    "models": "model.name, or your own my_package:build_model",
    "optimizers": "training.optimizer, or your own my_package:my_optimizer",
    "averagings": "training.averaging",
    "metrics": "tier2.metrics; swa_gain, sam_gain, entropy_sgd_gain in tier2.refinements",
    "corruptions": "verification.corrupted",
    "schedulers": "tier1.scheduler",
    "searchers": "searcher.name",
    "proxies": "searcher.proxy.name",
    "schedules": "training.schedule",
    "stop_rules": "tier1.stop_rules",
    "search_rules": "tier1.search_rules",
    "augmentations": "training.augmentation",
    "presets": "score.preset",
    "callbacks": "training.callbacks",
    "analyses": "analyses of a landscape file, or `llp landscape --only`",
    "sharpness_measures": "sharpness.measures of a landscape file",
}
"""Table of names -> where an experiment file uses them."""

CHECK_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def console(*, stderr: bool = False) -> Console:
    """A console that breaks lines only on a terminal; piped output keeps its lines whole."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 10_000, highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _row(table: Table, *cells: object) -> None:
    table.add_row(*map(printable, cells))


def _lines(out: Console, *lines: str, style: str = "") -> None:
    for line in lines:
        out.print(Text(printable(line).rstrip()), style=style, soft_wrap=True)


def _facts(out: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Labels and what there is to say, the second column folded under itself."""
    table = _table("", "")
    table.show_header = False
    for fact in facts:
        _row(table, *fact)
    put(out, table)


# Before a search


def show_plan(plan: Plan, spec: Spec, out: Console, report: CheckReport | None = None) -> None:
    """The rungs with their images, epochs and cost, what all of it comes to, and the pace."""
    from llp.spec import notes

    _lines(
        out,
        f"{spec.name}: {formats.count(plan.num_train)} training, "
        f"{formats.count(plan.num_validation)} validation and {formats.count(plan.num_test)} test "
        f"images in {plan.num_classes} classes",
    )
    table = _table("rung", "data", "images", "epochs", "trials", "samples")
    for rung in plan.rungs:
        jobs = plan.jobs_per_rung.get(rung.rung, 0)
        images, samples = formats.count(rung.num_examples), jobs * rung.samples_seen
        fraction = f"{100 * rung.data_fraction:.3g} %"
        _row(table, rung.rung, fraction, images, rung.epochs, jobs, formats.amount(samples))
    put(out, table)
    total = plan.samples_tier1 + plan.samples_tier2 + plan.samples_verification
    share = 100 * total / max(plan.samples_full_search, 1)
    verification = spec.verification
    top, seeds = min(verification.top_k, plan.num_trials), verification.num_seeds
    each = f"{formats.plural(seeds, 'seed')} each"
    if verification.race:
        each = f"{seeds} to {verification.max_seeds} seeds each, until the order is settled"
    facts = [
        (
            "tier 1",
            f"{formats.amount(plan.samples_tier1)} samples when nothing is stopped early "
            "(a sample is one training image in one epoch)",
        ),
        (
            "tier 2",
            f"about {formats.amount(plan.samples_tier2)} samples: the landscape around "
            f"{formats.plural(min(spec.tier2.top_k, plan.num_trials), 'configuration')}",
        ),
        (
            "verification",
            f"{formats.amount(plan.samples_verification)} samples: full training of the best "
            f"{formats.plural(top, 'configuration')}, {each}",
        ),
        (
            "in all",
            f"{formats.amount(total)} samples, {share:.3g} % of the "
            f"{formats.amount(plan.samples_full_search)} it takes to train all "
            f"{formats.plural(plan.num_trials, 'configuration')} fully",
        ),
    ]
    if plan.left_out:
        hint = f"left out, as even the least of it is over tier2.budget: {', '.join(plan.left_out)}"
        facts.insert(2, ("", hint))
    if plan.ties is not None:
        facts += [("ties", _about_ties(plan, plan.ties, spec))]
    if plan.earlier is not None:
        facts += zip(["warm start", "", ""], about_earlier(plan.earlier), strict=False)
    if share >= 100:
        hint = "this search saves nothing: try more configurations or verify fewer"
        facts += [("", hint)]
    if report is not None:
        facts += _pace(report, spec, total - plan.samples_tier2)
    facts += [("note", str(note)) for note in notes(spec)]
    _facts(out, facts)
    if report is not None:
        _lines(out, "the file is good")


def _about_ties(plan: Plan, ties: TieBreak, spec: Spec) -> str:
    """Whether tier 2 will settle ties at promotions, why, and what that costs."""
    if not ties.used:
        return f"tier 2 will not settle ties at promotions: {ties.reason}"
    said = (
        f"tier 2 settles ties at promotions, as {ties.reason}; measured beyond the samples of "
        "tier 2 above, "
    )
    share = f"at most {spec.tier2.budget:g} of the samples of its probe for each tied trial"
    said += share if spec.tier2.budget else "without a limit, as tier2.budget is 0"
    for rung, names in plan.left_out_of_ties.items():
        said += f"; left out on rung {rung}, as over tier2.budget: {', '.join(names)}"
        if set(names) == set(ties.metrics):
            said += " (accuracy alone decides there)"
    return said


def _pace(report: CheckReport, spec: Spec, total: int) -> Iterable[tuple[str, str]]:
    """How long a step takes and all steps will; a drawn configuration stands for the search."""
    drawn, plan = report.batch["sampled"], report.plan
    yield "model", f"{formats.count(report.model_parameters)} parameters with the file's own values"
    yield (
        "one step",
        f"{drawn['seconds']:.3g} s for {formats.plural(drawn['batch_size'], 'image')} and "
        f"{formats.count(drawn['parameters'])} parameters on {drawn['device']}, with the first "
        "random configuration",
    )
    evaluations = sum(
        plan.jobs_per_rung.get(rung.rung, 0) * math.ceil(rung.epochs / spec.tier1.report_every)
        for rung in plan.rungs
    ) + plan.samples_verification // max(plan.num_train, 1)
    seconds = total * drawn["seconds"] + (
        evaluations * plan.num_validation * drawn["evaluation_seconds"]
    )
    yield (
        "time",
        f"{formats.duration(seconds / drawn['batch_size'])} on one worker at that pace, evaluation "
        "included; tier 2 and the start of the workers come on top",
    )


# A study


def show_status(state: ProgressState, folder: Path, out: Console) -> None:
    """How far a study is, and its page once there is one."""
    put(out, block(state))
    page = folder / "report.html"
    if state.status != "running" and page.is_file():
        _lines(out, f"report {page}")


def show_studies(studies: Iterable[StudySummary], out: Console) -> None:
    """One line a study."""
    table = _table("study", "status", "trials", "winner", "last event")
    for row in studies:
        moment = formats.moment(row.updated or row.started)
        _row(table, row.study_id, row.status, str(row.num_trials), row.winner or "-", moment)
    put(out, table)


def show_summary(result: SearchResult, folder: Path, out: Console) -> None:
    """The answer: winner, how sure, what it cost, and where to look and go next."""
    from llp.reporting.tie_exhibit import tie_sentence
    from llp.tracking import links

    cost = result.cost
    spent = cost.tier1 + cost.tier2 + cost.verification
    facts: list[tuple[str, str]] = []
    if result.winner:
        config = next(t.trial for t in result.trials if t.trial.trial_id == result.winner)
        _lines(out, f"winner {result.winner}", style="bold green")
        _lines(out, *(f"  {line}" for line in yaml_text.dump(config.hyperparameters).splitlines()))
        runs = next((row for row in verified(result) if row.trial_id == result.winner), None)
        facts += [("accuracy", _accuracy(runs) if runs else "not verified")]
        labels = ["how sure", *[""] * 9]
        facts += list(zip(labels, _how_sure(result), strict=False))
    if result.score_report and result.score_report.sentence:
        facts += [("tier 2", result.score_report.sentence)]
    if ties := tie_sentence(result):
        facts += [("ties", ties)]
    times = ""
    if spent > cost.full_search > 0:
        times = f" (this search took {spent / cost.full_search:.1f} times MORE)"
    elif spent:
        times = f" ({cost.full_search / spent:.1f} times as many)"
    facts += [
        (
            "cost",
            f"{formats.amount(spent)} samples in {formats.duration(sum(cost.seconds.values()))}; "
            f"training all {len(result.trials)} fully: {formats.amount(cost.full_search)}{times}",
        )
    ]
    if result.earlier is not None:
        facts += zip(["warm start", "", ""], about_earlier(result.earlier), strict=False)
    facts += [
        ("stopping", f"early stopping went off, {decision.reason}")
        for decision in result.decisions
        if decision.kind == "stops_off"
    ]
    page, name = folder / "report.html", shlex.quote(str(folder))
    if page.is_file():
        facts += [("report", str(page))]
    tracking = result.spec.get("tracking")
    if isinstance(tracking, Mapping) and tracking.get("mlflow"):
        facts += [("mlflow", links.study_link(folder) or f"llp ui {name}")]
    facts += [("more", f"llp show {name} best")]
    _facts(out, facts)


def _accuracy(runs: Verified) -> str:
    low, high = runs.sampling_interval
    each = ", ".join(formats.percent(accuracy) for accuracy in runs.accuracies)
    num = len(runs.accuracies)
    return (
        f"{formats.percent(runs.mean)} on the test images"
        + (
            f", the mean of {num} full trainings ({each})"
            if num > 1
            else " after one full training"
        )
        + f"; {formats.count(runs.num_test_examples)} test images alone leave "
        f"{formats.percent(low)} to {formats.percent(high)} open (95 % interval)"
    )


def _how_sure(result: SearchResult) -> Iterable[str]:
    if result.winner_reason:
        yield result.winner_reason
    report = result.score_report
    if report is None:
        return
    for place, score in enumerate(report.scores, 1):
        if score.trial_id == result.winner:
            yield (
                f"by the score of tiers 1 and 2 it is number {place} of {len(report.scores)}: "
                f"{_score(score)}; that score chose what to train fully, and the full trainings "
                "chose the winner"
            )
    for tie in report.ties:
        if result.winner in tie:
            others = [trial_id for trial_id in tie if trial_id != result.winner]
            yield f"the score cannot tell it apart from {formats.listed(others)}"


def _score(score: GeneralizationScore) -> str:
    value, low, high = map(formats.number, (score.value, score.interval.low, score.interval.high))
    return f"{value}, {100 * score.interval.level:.0f} % interval {low} to {high}"


# A trial


def about_trial(result: SearchResult, trial_id: str) -> dict[str, Any]:
    """All that the study knows of one trial."""
    scores = result.score_report.scores if result.score_report else ()
    return {
        "study_id": result.study_id,
        "trial_id": trial_id,
        "winner": result.winner == trial_id,
        "rungs": result.rungs,
        "trial": next(t for t in result.trials if t.trial.trial_id == trial_id),
        "decisions": [d for d in result.decisions if d.trial_id == trial_id],
        "ties": [c for c in result.tie_choices if trial_id in c.tied],
        "early_stopping": next((d.reason for d in result.decisions if d.kind == "stops_off"), ""),
        "profile": next((p for p in result.profiles if p.trial_id == trial_id), None),
        "score": next((s for s in scores if s.trial_id == trial_id), None),
        "verifications": [v for v in result.verifications if v.trial_id == trial_id],
    }


def _decision(decision: Decision) -> str:
    """One line: what was decided, why, and the accuracy that was forecast then."""
    text = f"  {decision.kind:7} rung {decision.rung}  {decision.reason}"
    forecast = decision.predicted_final
    if forecast is None:
        return text
    low, high = formats.percent(forecast.low), formats.percent(forecast.high)
    return f"{text}  (forecast {low} to {high})"


def _tie(choice: TieChoice, trial_id: str) -> str:
    """One line: what tier 2 settled for a trial at a cut, and what accuracy would have."""
    kept, usual = trial_id in choice.kept, trial_id in choice.usual
    text = f"  {'tie':7} rung {choice.rung}  {'kept' if kept else 'passed over'} by tier 2 among "
    text += f"{formats.plural(len(choice.tied), 'tied trial')} "
    text += f"(value {formats.signed(choice.values[trial_id], 3)}); by accuracy alone "
    if kept == usual:
        return f"{text}as well"
    return f"{text}it would {'have gone on' if usual else 'not have gone on'}"


def show_trial(about: Mapping[str, Any], out: Console) -> None:
    """All that `about_trial` found, in the order in which it happened."""
    trial = about["trial"]
    _lines(out, f"{about['trial_id']}  {_outcome(about)}", style="bold")
    _lines(
        out,
        f"{formats.amount(trial.samples_seen)} samples, {formats.duration(trial.seconds)}, "
        f"seed {trial.trial.seed}",
        *(f"  {line}" for line in yaml_text.dump(trial.trial.hyperparameters).splitlines()),
    )
    if trial.failure:
        _lines(out, "failure", style="bold")
        _lines(out, *(f"  {line}" for line in trial.failure.strip().splitlines()))
    _show_curves(trial.curves, out)
    if about.get("full_training"):
        mean, interval = about["full_training"]
        ends = formats.percent(interval.low), formats.percent(interval.high)
        _lines(
            out,
            f"full training: forecast accuracy {formats.percent(mean)} "
            f"({100 * interval.level:.0f} % interval {ends[0]} to {ends[1]})",
        )
    _lines(out, "decisions", style="bold")
    _lines(out, *(_decision(d) for d in about["decisions"]))
    _lines(out, *(_tie(choice, about["trial_id"]) for choice in about["ties"]))
    if about["early_stopping"]:
        _lines(out, f"early stopping went off in this study: {about['early_stopping']}")
    if about["profile"]:
        _lines(out, "landscape", style="bold")
        table = _table("measurement", "value", "standard error", "examples", "cost", "time", "note")
        for m in about["profile"].measurements:
            value, error = formats.number(m.value), formats.number(m.standard_error)
            seconds = formats.duration(m.seconds)
            counts = formats.count(m.num_examples), formats.count(m.samples)
            _row(table, m.name, value, error, *counts, seconds, m.note)
        put(out, table)
        if about["profile"].note:
            _lines(
                out, f"  {about['profile'].note}; cost {formats.count(about['profile'].samples)}"
            )
    if about["score"]:
        score = about["score"]
        _lines(out, f"score {_score(score)}, preset {score.preset}", style="bold")
        for term, addend in score.contributions.items():
            why = "  (it ended on a lower rung than others)" if term == "level" else ""
            if addend:
                _lines(out, f"  {formats.signed(addend, 4):>9}  {term}{why}")
        chance = formats.probability(score.probability_best)
        _lines(out, f"  chance that no other has a higher score: {chance}")
    if about["verifications"]:
        _lines(out, "verified by full training", style="bold")
        table = _table("test accuracy", "val. accuracy", "time", "seed")
        for run in about["verifications"]:
            test, validation = map(formats.percent, (run.test_accuracy, run.validation_accuracy))
            _row(table, test, validation, formats.duration(run.seconds), run.seed)
        put(out, table)


def _outcome(about: Mapping[str, Any]) -> str:
    trial = about["trial"]
    words = trial.outcome.replace("_", " ")
    if trial.outcome == "completed" and trial.stopped_by:
        words += f" {trial.stopped_by} and not promoted"
    elif trial.stopped_by:
        words += f" by {trial.stopped_by}"
    return f"{words}, the winner" if about["winner"] else str(words)


def _show_curves(curves: Iterable[Any], out: Console) -> None:
    """Some evaluations of each rung, the first and the last among them."""
    table = _table("rung", "data", "epoch", "samples", "train loss", "val. loss", "val. accuracy")
    shown = left_out = 0
    for curve in curves:
        last = len(curve.points) - 1
        num = min(CURVE_POINTS, last + 1)
        for point in (curve.points[round(i * last / max(num - 1, 1))] for i in range(num)):
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
        shown, left_out = shown + num, left_out + last + 1 - num
    some = f" ({shown} of {shown + left_out} evaluations; all: --json)" if left_out else ""
    _lines(out, f"curves{some}", style="bold")
    put(out, table)


# Names and checks


def show_entries(table_name: str, entries: Mapping[str, Entry], out: Console) -> None:
    """The rows of one table of names, options only where there are any, and where they go."""
    with_options = any(entry.options for entry in entries.values())
    table = _table("name", "what it is", *["options and defaults"] * with_options)
    for name, entry in entries.items():
        _row(table, name, entry.summary, *[settings(entry.options)] * with_options)
    put(out, table)
    _lines(out, f"in an experiment file: {PLACES[table_name]}", style="dim")


def show_check(check: Check, out: Console) -> None:
    """One finding of `llp doctor`, with what to do about it."""
    line = Text(f"{check.status:4}", style=CHECK_COLOURS[check.status])
    line.append(f" {check.name:15} {printable(check.found)}", style="default not bold")
    out.print(line, soft_wrap=True)
    if check.todo:
        _lines(out, f"     do: {check.todo}")
