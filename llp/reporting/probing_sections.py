"""The sections on tier 1: where the budget went, learning curves, rank agreement, all trials."""

from __future__ import annotations

from collections import Counter

import pandas as pd

from llp.records import SearchResult
from llp.reporting import formats
from llp.reporting.exhibits import Data, Exhibit, Key, Section, drawn, seconds, share, signed, whole
from llp.reporting.figures import cost, ladder, ranks
from llp.reporting.study import FAILURES, STATES, axes, common_rung, final_on, reached
from llp.reporting.tables import Column, table, text


def cost_exhibit(result: SearchResult) -> Exhibit:
    """The cost bars of the verdict box."""
    data = cost.cost_data(result)
    columns = (
        text("label", "part"),
        whole("samples_seen", "samples seen"),
        share("share", "share of full search"),
    )
    spent = bool(data["samples_seen"].sum())
    return Exhibit(
        key="cost",
        title="",
        reading=cost.cost_reading(data),
        svgs=drawn(cost.cost_figure(data)) if spent else (),
        legend=tuple(
            Key(label, role, "bar", hatch) for hatch, (_, label, role) in enumerate(cost.PARTS)
        )
        if spent
        else (),
        data=(Data("Cost by part", table(data, columns)),),
        wide=True,
    )


def ladder_section(result: SearchResult) -> Section:
    """How the ladder spent the budget."""
    data = ladder.ladder_data(result)
    columns = (
        whole("rung", "rung"),
        share("data_fraction", "fraction"),
        whole("num_examples", "images"),
        whole("epochs", "epochs"),
        whole("started", "started"),
        *(whole(state, state.replace("_", " ")) for state in STATES if data[state].sum()),
        whole("samples_seen", "samples seen"),
    )
    present = [state for state in STATES if data[state].sum()]
    hatches = {"": 0, "///": 1, "...": 2, "\\\\\\": 3, "xxx": 4, "---": 5}
    bars = Exhibit(
        key="ladder",
        title="",
        reading=ladder.ladder_reading(data),
        svgs=drawn(ladder.ladder_figure(data)) if data["started"].sum() else (),
        legend=tuple(
            Key(
                state.replace("_", " "),
                ladder.STATE_STYLES[state][0],
                "bar",
                hatches[ladder.STATE_STYLES[state][1]],
            )
            for state in present
        ),
        data=(Data("Rungs", table(data, columns), shown=True),),
        wide=True,
    )
    saved = cost.savings_data(result)
    saved_columns = (
        text("reason", "how trials ended"),
        whole("num_trials", "trials"),
        whole("samples_seen", "samples spent"),
        whole("saved", "samples saved"),
    )
    savings = Exhibit(
        key="savings",
        title="What saved the budget",
        reading=cost.savings_reading(saved) if len(saved) else "No trial has run yet.",
        data=(Data("Savings by reason", table(saved, saved_columns), shown=True),)
        if len(saved)
        else (),
        note="Saved: one full training of the same trials, minus what they were given.",
    )
    decisions = pd.DataFrame(
        [
            {
                "kind": decision.kind,
                "trial_id": decision.trial_id,
                "rung": decision.rung,
                "reason": formats.short(decision.reason, 300),
                "low": decision.predicted_final.low if decision.predicted_final else None,
                "high": decision.predicted_final.high if decision.predicted_final else None,
            }
            for decision in result.decisions
            if decision.kind != "new"
        ],
        columns=["kind", "trial_id", "rung", "reason", "low", "high"],
    )
    decision_columns = (
        text("kind", "decision"),
        text("trial_id", "trial"),
        whole("rung", "rung"),
        text("reason", "reason"),
        Column("low", "forecast from"),
        Column("high", "to"),
    )
    counts = decisions["kind"].value_counts()
    log = Exhibit(
        key="decisions",
        title="Decisions",
        reading=", ".join(
            formats.plural(int(counts[kind]), *nouns)
            for kind, *nouns in (
                ("promote", "promotion"),
                ("stop", "early stop"),
                ("audit", "audit"),
                ("retry", "retry", "retries"),
            )
            if kind in counts
        )
        + "."
        + "".join(f" Tier 1 ended early, {d.reason}." for d in result.decisions if d.kind == "end")
        if len(counts)
        else "No trial has been promoted, stopped or retried.",
        data=(Data("Every decision with its reason", table(decisions, decision_columns)),)
        if len(decisions)
        else (),
    )
    return Section(
        "ladder",
        "How the ladder spent the budget",
        "A rung is a share of the training images and a number of epochs. Many configurations "
        "start on the lowest; few are promoted to the next.",
        (bars, savings, log, *_audit_exhibits(result)),
    )


def _audit_exhibits(result: SearchResult) -> tuple[Exhibit, ...]:
    """Whether early stops were right; nothing where none was audited."""
    found = result.stop_audit
    audits = [decision for decision in result.decisions if decision.kind == "audit"]
    if found is None:
        return ()
    curves = {(c.trial_id, c.rung): c.points for trial in result.trials for c in trial.curves}
    ends = {rung.rung: rung.epochs for rung in result.rungs}
    rows = []
    for decision in audits:
        points = curves.get((decision.trial_id, decision.rung), ())
        over = bool(points) and points[-1].epoch == ends[decision.rung]
        final = points[-1].validation_accuracy if over else None
        rows.append(
            {
                "trial_id": decision.trial_id,
                "rung": decision.rung,
                "needed": decision.needed,
                "low": decision.predicted_final.low if decision.predicted_final else None,
                "high": decision.predicted_final.high if decision.predicted_final else None,
                "final": final,
            }
        )
    frame = pd.DataFrame(rows, columns=["trial_id", "rung", "needed", "low", "high", "final"])
    columns = (
        text("trial_id", "trial"),
        whole("rung", "rung"),
        share("needed", "accuracy needed"),
        share("low", "forecast from"),
        share("high", "to"),
        share("final", "reached"),
    )
    reading = (
        f"{found.num_false} of {formats.plural(found.num_audits, 'audited stop')} reached what the "
        f"rule said would be missed. The true share of wrong stops lies between "
        f"{found.rate.low:.0%} and {found.rate.high:.0%} ({found.rate.level:.0%} interval); the "
        f"rule promises {found.delta:.0%}."
        if found.num_audits
        else "No audited job has ended yet."
    )
    exhibit = Exhibit(
        key="audits",
        title="Were early stops right?",
        reading=reading,
        data=(Data("Every audit", table(frame, columns)),),
        note="A few jobs run on although a rule would have stopped them. Where too many of them "
        "turn out well, the rules ask for more certainty.",
    )
    return (exhibit,)


def curves_section(result: SearchResult) -> Section:
    """Learning curves."""
    data = ladder.curves_data(result)
    columns = (
        whole("rung", "rung"),
        text("trial_id", "trial"),
        text("state", "state"),
        whole("epochs", "epochs"),
        share("first", "first accuracy"),
        share("best", "best"),
        share("last", "last"),
        Column("validation_loss", "last loss"),
    )
    exhibit = Exhibit(
        key="curves",
        title="",
        reading=ladder.curves_reading(data),
        svgs=drawn(*ladder.curves_figures(data)),
        legend=tuple(
            key
            for key, drawn_here in (
                (Key("winner", "vermillion"), data["winner"].any()),
                (Key("promoted", "blue"), (data["state"] == "promoted").any()),
                (Key("finished, not promoted", "sky"), (data["state"] == "finished").any()),
                (
                    Key("stopped by a rule", "faint", "dashed"),
                    (data["state"] == "stopped").any(),
                ),
                (
                    Key("diverged or failed (×), or unfinished", "faint", "dotted"),
                    data["state"].isin([*FAILURES, "unfinished"]).any(),
                ),
            )
            if drawn_here
        ),
        data=(Data("Every curve", table(ladder.curve_summary(data), columns), sortable=True),)
        if len(data)
        else (),
        note=""
        if len(data)
        else "Curves appear here once a trial has reported its first evaluation.",
    )
    return Section("curves", "Learning curves", "Validation accuracy by epoch.", (exhibit,))


def ranks_section(result: SearchResult) -> Section:
    """Rank agreement between rungs."""
    data = ranks.rank_agreement_data(result)
    columns = (
        text("lower", "between"),
        text("higher", "and"),
        whole("num_trials", "n"),
        signed("tau", "Kendall tau"),
        signed("low", "from"),
        signed("high", "to (90 %)"),
    )
    stages = ranks.accuracies_by_stage(result)
    trials = dict.fromkeys(trial_id for finals in stages.values() for trial_id in finals)
    by_stage = pd.DataFrame(
        [{"trial_id": t, **{name: stages[name].get(t) for name in stages}} for t in trials]
    )
    stage_columns = (text("trial_id", "trial"), *(share(name, name) for name in stages))
    exhibit = Exhibit(
        key="ranks",
        title="",
        reading=ranks.rank_agreement_reading(data),
        svgs=drawn(*ranks.rank_agreement_figures(stages)),
        data=(
            *((Data("All pairs", table(data, columns)),) if len(data) else ()),
            *((Data("Accuracies", table(by_stage, stage_columns)),) if len(by_stage) else ()),
        ),
        note="Only trials that finished both can be compared, and they were chosen for being good "
        "on the lower one; all trials together would agree more. “Verified” is mean test accuracy "
        "after full training.",
    )
    return Section(
        "ranks",
        "Do cheap rungs order trials as dear ones do?",
        "Early stopping is only as good as this agreement.",
        (exhibit,),
    )


def trials_section(result: SearchResult) -> Section:
    """All trials, by score and then by how far and how well they got."""
    known = {s.trial_id: s for s in (result.score_report.scores if result.score_report else ())}
    searched = axes(result)
    common = common_rung(result)
    rows = []
    for trial in result.trials:
        trial_id, rung = trial.trial.trial_id, reached(trial)
        point = final_on(trial, rung)
        score = known.get(trial_id)
        base = final_on(trial, common.rung) if common else None
        row: dict[str, object] = {
            "trial_id": trial_id,
            "outcome": trial.outcome.replace("_", " "),
            "why": "not promoted" if trial.stopped_by.startswith("rung ") else trial.stopped_by,
            "rung": rung or None,
            "score": score.value if score else None,
            "probability": score.probability_best if score else None,
            "accuracy": point.validation_accuracy if point else None,
            "loss": point.validation_loss if point else None,
            "base": base.validation_accuracy if base else None,
            "samples_seen": trial.samples_seen,
            "seconds": trial.seconds,
            "seed": trial.trial.seed,
        }
        row |= {f"h{i}": trial.trial.hyperparameters.get(a.name) for i, a in enumerate(searched)}
        order = (
            trial_id != result.winner,
            -score.value if score and score.value == score.value else float("inf"),
            -rung,
            -point.validation_accuracy if point else 0.0,
        )
        rows.append((order, row))
    rows.sort(key=lambda item: item[0])
    columns = (
        text("trial_id", "trial"),
        text("outcome", "outcome"),
        text("why", "ended by"),
        whole("rung", "rung"),
        Column("score", "score"),
        Column("probability", "P(best)", formats.probability),
        share("accuracy", "accuracy there"),
        Column("loss", "loss there"),
        *(
            Column(f"h{i}", formats.short(axis.name, 40), numeric=not axis.categories)
            for i, axis in enumerate(searched)
        ),
        share("base", f"accuracy, rung {common.rung if common else 0}"),
        whole("samples_seen", "samples seen"),
        seconds("seconds", "time"),
        Column("seed", "seed", str),
    )
    frame = pd.DataFrame([row for _, row in rows], columns=[c.key for c in columns], dtype=object)
    order_note = "By score, then by rung and accuracy"
    if result.winner:
        order_note = "The winner first, then by score"
    outcomes = Counter(str(row["outcome"]) for _, row in rows)
    exhibit = Exhibit(
        key="trials",
        title="",
        reading=formats.listed([f"{num} {name}" for name, num in outcomes.most_common()]) + "."
        if len(frame)
        else "No trial has been started.",
        data=(Data("", table(frame, columns), shown=True, sortable=True),) if len(frame) else (),
        note=f"{order_note}. Click a heading to sort." if len(frame) else "",
    )
    return Section("trials", "All trials", "Accuracy is on the validation split.", (exhibit,))
