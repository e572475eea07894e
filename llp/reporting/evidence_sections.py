"""The sections on why: hyperparameters, landscape, scores, verification."""

from __future__ import annotations

import pandas as pd

from llp.records import SearchResult
from llp.reporting import formats
from llp.reporting.exhibits import Data, Exhibit, Key, Section, drawn, seconds, share, signed, whole
from llp.reporting.figures import flatness, importance, scores, space
from llp.reporting.palette import MARKERS, SERIES
from llp.reporting.study import verified
from llp.reporting.tables import Column, table, text


def space_section(result: SearchResult) -> Section:
    """Parallel coordinates, importance, slices."""
    data = space.space_data(result)
    usable = len(data.frame) > 0 and len(data.axes) > 0
    renamed = data.frame.rename(columns={f"axis {i}": f"h{i}" for i in range(len(data.axes))})
    columns = (
        text("trial_id", "trial"),
        text("group", "group"),
        share("accuracy", f"accuracy, rung {data.rung}"),
        *(
            Column(f"h{i}", formats.short(axis.name, 40), numeric=not axis.categories)
            for i, axis in enumerate(data.axes)
        ),
    )
    left_out = ""
    if len(data.axes) > space.MAX_AXES:
        left_out = f" The first {space.MAX_AXES} of {len(data.axes)} hyperparameters are drawn."
    parallel = Exhibit(
        key="parallel",
        title="All configurations",
        reading=space.parallel_reading(data),
        svgs=drawn(space.parallel_figure(data)) if usable else (),
        legend=tuple(
            key
            for group, key in (
                ("winner", Key("winner", "vermillion")),
                ("best", Key(f"best on rung {data.rung}", "blue")),
                ("other", Key("others", "rule")),
                ("failed", Key("diverged or failed", "faint", "dotted")),
            )
            if (data.frame["group"] == group).any()
        ),
        data=(Data("Values", table(renamed, columns), sortable=True),) if usable else (),
        note="Axes are logarithmic where the search was. A line that dips below an axis has no "
        f"such hyperparameter, or no accuracy.{left_out}"
        if usable
        else "There is nothing to draw before the first trial.",
        wide=True,
    )
    weights = importance.importance_data(data)
    weight_columns = (
        text("name", "hyperparameter"),
        signed("importance", "loss of R²"),
        Column("spread", "± over shuffles", lambda value: f"{value:.2f}"),
        signed("correlation", "Spearman's rho"),
        whole("num_trials", "n"),
    )
    important = Exhibit(
        key="importance",
        title="Importance",
        reading=importance.importance_reading(weights),
        svgs=drawn(importance.importance_figure(weights))
        if weights.held_out >= importance.USABLE
        else (),
        data=(Data("Importance and rank correlation", table(weights.frame, weight_columns)),)
        if len(weights.frame)
        else (),
        note="Loss of held-out R² of a random forest on ranks when one column is shuffled. It "
        "holds for this search space and budget only; bars show the spread over shuffles, not "
        "what another study would give.",
        wide=True,
    )
    sliced = Exhibit(
        key="slices",
        title="One hyperparameter at a time",
        reading=space.slices_reading(data),
        svgs=drawn(*space.slice_figures(data)),
        legend=(
            *(
                Key(
                    f"got to rung {rung.rung}",
                    "blue" if rung.rung > data.rung else "faint",
                    MARKERS[(rung.rung - 1) % len(MARKERS)],
                )
                for rung in result.rungs
                if (data.frame["reached"] == rung.rung).any()
            ),
            *((Key("winner", "vermillion", "ring"),) if result.winner else ()),
        ),
        note="The numbers are in the table under “All configurations”." if usable else "",
    )
    return Section(
        "space",
        "What the hyperparameters did",
        f"Trials are compared at equal budget, on rung {data.rung}, which most were trained on."
        if data.rung
        else "No trial has run yet.",
        (parallel, important, sliced),
    )


def flatness_section(result: SearchResult) -> Section:
    """Tier 2 against tier 1."""
    lead = (
        "Tier 2 measures the loss landscape around the survivors' weights. A flat minimum is not "
        "good in itself: read it beside the accuracy of the same weights."
    )
    data = flatness.flatness_data(result)
    if data.empty:
        reason = "No configuration was measured: the study did not get to tier 2."
        if result.status == "finished":
            reason = "No configuration was measured: tier 2 was turned off or had no survivor."
        return Section(
            "flatness", "Tier 2 against tier 1", lead, (Exhibit("flatness", "", reason),)
        )
    summary_columns = (
        text("metric", "metric"),
        whole("num_trials", "measured"),
        whole("failed", "not measured"),
        signed("tau", "tau with accuracy"),
        signed("low", "from"),
        signed("high", "to (90 %)"),
        share("relative_error", "relative error"),
        seconds("seconds", "time"),
        whole("samples", "samples"),
        whole("samples_alone", "alone"),
    )
    columns = (
        text("trial_id", "trial"),
        text("metric", "metric"),
        Column("value", "value"),
        Column("standard_error", "± standard error", lambda value: formats.number(value, 2)),
        whole("num_examples", "images"),
        seconds("seconds", "time"),
        whole("samples", "samples"),
        whole("rung", "rung"),
        share("validation_accuracy", "accuracy"),
        text("note", "note"),
    )
    rungs = sorted(set(data["rung"]))
    exhibit = Exhibit(
        key="flatness",
        title="",
        reading=flatness.flatness_reading(data, result.profiles),
        svgs=drawn(*flatness.flatness_figures(data, result.winner)),
        legend=(
            *(
                Key(f"checkpoint of rung {rung}", "blue", MARKERS[(int(rung) - 1) % len(MARKERS)])
                for rung in rungs
            ),
            *((Key("winner", "vermillion", "ring"),) if result.winner else ()),
        ),
        data=(
            Data("By metric", table(flatness.flatness_summary(data), summary_columns), shown=True),
            Data("Every measurement", table(data, columns), sortable=True),
        ),
        note="Upwards: validation accuracy of the measured weights. Bars are standard errors of "
        "the estimate, where it has one. Samples: cost in training images; metrics share gradients "
        "and Hessian products, and the first that needs one pays; alone: without sharing."
        + _budget(result),
    )
    return Section("flatness", "Tier 2 against tier 1", lead, (exhibit,))


def _budget(result: SearchResult) -> str:
    """What the budget of tier 2 chose, as the first profile says it."""
    chosen = dict.fromkeys(profile.note for profile in result.profiles if profile.note)
    return f" Chosen by the {formats.clean(next(iter(chosen)))}." if chosen else ""


def scores_section(result: SearchResult) -> Section:
    """Scores, contributions, ablation."""
    report = result.score_report
    lead = "The score orders configurations before any is trained fully."
    if report is None or not report.scores:
        why = "There are no scores: the study did not get to scoring."
        if report is not None:
            why = "There are no scores: no configuration had a usable result."
        return Section("scores", "Scores", lead, (Exhibit("scores", "", why),))
    data = scores.scores_data(result)
    names = scores.terms(data)
    moved = scores.contributions_data(data)
    renamed = data.rename(columns={f"term {name}": f"t{i}" for i, name in enumerate(names)})
    columns = (
        whole("rank", "rank"),
        text("trial_id", "trial"),
        Column("value", "score"),
        Column("low", "from"),
        Column("high", f"to ({formats.percent(data['level'].iloc[0], 0)})"),
        Column("probability_best", "P(best)", formats.probability),
        *(Column(f"t{i}", formats.short(name, 40)) for i, name in enumerate(names)),
    )
    moved_named = moved.rename(columns={f"term {name}": f"t{i}" for i, name in enumerate(names)})
    moved_columns = (
        text("trial_id", "trial"),
        signed("difference", "difference"),
        *(signed(f"t{i}", formats.short(name, 40)) for i, name in enumerate(names)),
    )
    shown = min(len(data), scores.MAX_SHOWN)
    exhibits = [
        Exhibit(
            key="scores",
            title="",
            reading=scores.scores_reading(data),
            svgs=drawn(scores.scores_figure(data, result.winner)),
            legend=(
                Key("score and interval", "blue", "o"),
                *((Key("verified winner", "vermillion", "D"),) if result.winner else ()),
            ),
            data=(Data("Scores and contributions", table(renamed, columns), sortable=True),),
            note=f"Preset {formats.short(report.preset, 40)}; the first {shown} of {len(data)}.",
            wide=True,
        )
    ]
    weights = pd.DataFrame(report.weights.items(), columns=["term", "weight"])
    exhibits.append(
        Exhibit(
            key="contributions",
            title="What moves the scores",
            reading=scores.contributions_reading(moved),
            svgs=drawn(scores.contributions_figure(moved)) if len(names) > 1 else (),
            legend=(
                *(
                    Key(formats.short(name, 40), role, "bar", hatch)
                    for hatch, (name, role) in enumerate(zip(names, SERIES, strict=False))
                ),
                Key("sum", "ink"),
            )
            if len(names) > 1
            else (),
            data=(
                Data("Differences", table(moved_named, moved_columns)),
                Data(
                    "Weights in force",
                    table(weights, (text("term", "term"), Column("weight", "weight"))),
                ),
            )
            if len(weights)
            else (),
            wide=True,
        )
    )
    ablation = scores.ablation_data(report.ablation)
    ablation_columns = (
        text("name", "ranking by"),
        signed("tau", "Kendall tau"),
        signed("low", "from"),
        signed("high", "to"),
        Column("regret_at_1", "regret@1, points", lambda value: f"{value:.2f}"),
        Column("regret_at_5", "regret@5, points", lambda value: f"{value:.2f}"),
        whole("samples_seen", "cost, samples"),
        whole("num_trials", "n"),
    )
    exhibits.append(
        Exhibit(
            key="ablation",
            title="Did tier 2 help?",
            reading=formats.clean(report.sentence) or "The score report says nothing about tier 2.",
            svgs=drawn(scores.ablation_figure(ablation)) if len(ablation) else (),
            data=(Data("Ablation", table(ablation, ablation_columns), shown=True),)
            if len(ablation)
            else (),
            note="Regret: accuracy lost by taking the first (or the best of the first five) of "
            "that ranking instead of the best, in percentage points."
            if len(ablation)
            else "There is no ablation table: too few verified results to compare with.",
            wide=True,
        )
    )
    return Section("scores", "Scores", lead, tuple(exhibits))


def verification_section(result: SearchResult) -> Section:
    """Full trainings."""
    lead = "The best few, trained fully with several seeds. Only here is the test split read, once."
    rows = verified(result)
    data = scores.verification_data(result)
    columns = (
        text("trial_id", "trial"),
        Column("seed", "seed", str),
        share("test_accuracy", "test accuracy"),
        Column("test_loss", "test loss"),
        share("validation_accuracy", "validation accuracy"),
        whole("num_test_examples", "test images"),
        whole("samples_seen", "samples seen"),
        seconds("seconds", "time"),
    )
    exhibit = Exhibit(
        key="verification",
        title="",
        reading=scores.margin_sentence(rows),
        svgs=drawn(scores.verification_figure(rows)) if rows else (),
        legend=(
            Key("one seed", "muted", "ring"),
            Key("mean ± standard error", "blue", "s"),
            Key("first place", "vermillion", "D"),
        )
        if rows
        else (),
        data=(Data("Every full training", table(data, columns)),) if len(data) else (),
        note="The winner was chosen among these by the same numbers, so its own is a little "
        "optimistic."
        if len(rows) > 1
        else "",
        wide=True,
    )
    return Section("verification", "Verification", lead, (exhibit,))
