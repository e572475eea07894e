"""The answer in a few lines: which configuration, how good, how sure, at what cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llp.records import SearchResult, TrialResult
from llp.reporting import formats, yaml_text
from llp.reporting.figures.scores import margin_sentence
from llp.reporting.study import FAILURES, Verified, final_on, find_trial, leader, reached, verified

_STATUS = {
    "running": "still running when this page was written",
    "interrupted": "interrupted; llp resume goes on from here",
    "finished": "finished",
    "failed": "failed",
}


@dataclass(frozen=True)
class Verdict:
    """The box at the top of the page.

    Attributes:
        status: One line on what was studied and how it ended.
        figure: The big number, empty when there is none.
        headline: The answer in one sentence.
        sure: How sure the tool is, in one sentence.
        facts: `(label, value)` pairs.
        yaml: The configuration to copy; empty when no trial is usable.
        yaml_title: What the configuration is.
    """

    status: str
    figure: str
    headline: str
    sure: str
    facts: tuple[tuple[str, str], ...]
    yaml: str
    yaml_title: str


def verdict(result: SearchResult) -> Verdict:
    """The verdict on `result`, whatever state it is in."""
    winner = find_trial(result, result.winner)
    chosen = winner or leader(result)
    tested = {row.trial_id: row for row in verified(result)}
    test = tested.get(winner.trial.trial_id) if winner else None
    figure = formats.percent(test.mean) if test else ""
    if test and math.isfinite(test.standard_error):
        figure = f"{formats.points(test.mean)} ± {formats.points(test.standard_error)} %"
    return Verdict(
        status=_status(result),
        figure=figure,
        headline=_headline(result, winner, chosen, test),
        sure=_sure(result, winner, tuple(tested.values())),
        facts=tuple(_facts(result, chosen, test)),
        yaml=_yaml(result, chosen) if chosen else "",
        yaml_title="The winner" if winner else "The best configuration so far",
    )


def _status(result: SearchResult) -> str:
    parts = [
        name for section in ("dataset", "model") if (name := _name(result.spec.get(section))) != ""
    ]
    parts.append(formats.plural(len(result.trials), "configuration"))
    return " · ".join([*parts, _STATUS.get(result.status, formats.clean(result.status))])


def _name(section: Any) -> str:
    return formats.short(section.get("name", ""), 80) if isinstance(section, Mapping) else ""


def _headline(
    result: SearchResult,
    winner: TrialResult | None,
    chosen: TrialResult | None,
    test: Verified | None,
) -> str:
    if winner and test:
        seeds = formats.plural(len(test.accuracies), "seed")
        spread = "mean ± standard error" if len(test.accuracies) > 1 else "no standard error"
        return (
            f"test accuracy of configuration {formats.clean(test.trial_id)}, trained fully "
            f"({spread}, {seeds}, {formats.count(test.num_test_examples)} test images)"
        )
    if winner:
        return (
            f"Configuration {formats.clean(winner.trial.trial_id)} was chosen, but no full "
            "training has verified it: its test accuracy is not known."
        )
    if chosen:
        rung = reached(chosen)
        point = final_on(chosen, rung)
        accuracy = formats.percent(point.validation_accuracy) if point else "unknown"
        return (
            f"No winner yet. Best so far is configuration {formats.clean(chosen.trial.trial_id)} "
            f"with {accuracy} validation accuracy on rung {rung} of {len(result.rungs)}; "
            "nothing has been verified on test data."
        )
    if result.trials:
        outcomes: Counter[str] = Counter(trial.outcome for trial in result.trials)
        told = formats.listed([f"{num} {name}" for name, num in sorted(outcomes.items())])
        failed = sum(outcomes[name] for name in FAILURES)
        if failed == len(result.trials):
            return f"No configuration produced a usable result: {told.replace('_', ' ')}."
        return f"No configuration has reported a result yet ({told.replace('_', ' ')})."
    return "No configuration has been tried yet."


def _sure(result: SearchResult, winner: TrialResult | None, tested: tuple[Verified, ...]) -> str:
    if winner:
        return formats.clean(result.winner_reason) or margin_sentence(tested)
    if result.winner_reason:
        return formats.clean(result.winner_reason)
    if result.trials and all(trial.outcome == "diverged" for trial in result.trials):
        return (
            "Every trial diverged. A lower upper end for learning_rate, a longer warm-up or "
            "gradient clipping are the usual ways out."
        )
    if result.trials and all(trial.outcome in FAILURES for trial in result.trials):
        return "The reasons are listed under Failures."
    return "An order of probes is not a verdict: without verification nothing here is certain."


def _facts(
    result: SearchResult, chosen: TrialResult | None, test: Verified | None
) -> list[tuple[str, str]]:
    facts = []
    if test:
        low, high = map(formats.percent, test.sampling_interval)
        images = formats.count(test.num_test_examples)
        facts.append(
            ("Test split", f"{images} images alone leave {low} to {high} open (95 % interval)")
        )
    winner = chosen.trial.trial_id if chosen and test else ""
    corrupted = [v.corrupted_test_accuracy for v in result.verifications if v.trial_id == winner]
    if corrupted and all(map(math.isfinite, corrupted)):
        mean = formats.percent(sum(corrupted) / len(corrupted))
        facts.append(("Corrupted test images", f"{mean}, the mean over corruptions and severities"))
    report = result.score_report
    scores = report.scores if report else ()
    for score in scores:
        if chosen and score.trial_id == chosen.trial.trial_id and report:
            facts.append(
                (
                    "Score",
                    f"{formats.number(score.value, 3)}, "
                    f"{formats.percent(score.interval.level, 0)} interval "
                    f"{formats.number(score.interval.low, 3)} to "
                    f"{formats.number(score.interval.high, 3)} "
                    f"(preset {formats.short(report.preset, 40)})",
                )
            )
            if len(scores) > 1:
                facts.append(
                    (
                        "Best before verification",
                        f"with probability {formats.probability(score.probability_best)} "
                        f"among {formats.plural(len(scores), 'scored configuration')}",
                    )
                )
    facts.append(("Wall clock", _clock(result)))
    return facts


def _clock(result: SearchResult) -> str:
    phases = [
        f"{formats.short(name, 20)} {formats.duration(seconds)}"
        for name, seconds in result.cost.seconds.items()
        if formats.is_number(seconds)
    ]
    total = sum(s for s in result.cost.seconds.values() if formats.is_number(s))
    if not phases:
        return formats.duration(max(result.finished - result.started, 0.0))
    return f"{formats.duration(total)} ({', '.join(phases)})"


def _yaml(result: SearchResult, chosen: TrialResult) -> str:
    values = dict(chosen.trial.hyperparameters)
    head = f"# {formats.short(chosen.trial.trial_id, 40)} of {formats.short(result.study_id, 80)}\n"
    return head + yaml_text.dump({"search_space": values})
