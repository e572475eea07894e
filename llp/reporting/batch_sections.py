"""Sections of a batch's page after its first: heat map, choices, studies, speed, cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from llp.comparing.convergence import SHARES, steps_to
from llp.comparing.significance import PairedTest, against
from llp.comparing.summary import (
    heat_map,
    largest,
    one_at_a_time,
    power_law,
    smallest,
    summary,
    tradeoff,
)
from llp.comparing.table import chosen, completed
from llp.reporting import formats
from llp.reporting.exhibits import Data, Exhibit, Key, Section, drawn, seconds, share, whole
from llp.reporting.figures import batches as drawings
from llp.reporting.tables import Column, table, text

STUDIES = {
    "ablation": "What do its parts contribute?",
    "sensitivity": "How much does it depend on its settings?",
    "scaling": "How does it scale?",
}


def heat_section(runs: pd.DataFrame) -> tuple[Section, ...]:
    """Optimizer against architecture; nothing with fewer than two optimizers or models."""
    cells = heat_map(completed(runs))
    if len(set(cells["optimizer"])) < 2 or len(cells) < 3 or len(set(cells["model"])) < 2:
        return ()
    best = largest(cells, "mean")
    columns = (
        text("optimizer", "optimizer"),
        text("model", "model"),
        Column("mean", "test accuracy", lambda v: formats.percent(v, 2)),
        Column("standard_error", "± standard error", lambda v: formats.percent(v, 2)),
        whole("num", "seeds"),
        whole("num_configurations", "configurations"),
    )
    exhibit = Exhibit(
        key="heat",
        title="",
        reading=f"Highest is {formats.clean(best['optimizer'])} with "
        f"{formats.clean(best['model'])}: {formats.percent(best['mean'], 2)}.",
        svgs=drawn(drawings.heat_figure(cells, "optimizer", "model")),
        data=(Data("All cells", table(cells, columns), sortable=True),),
        note="Where several configurations share a cell the best of them stands in it, which is "
        "too good by what the choice adds.",
    )
    lead = "Mean test accuracy of the runs' own configurations."
    return (Section("heat", "Optimizer and architecture", lead, (exhibit,)),)


def choice_section(
    events: Sequence[Mapping[str, Any]], runs: pd.DataFrame, batch: Mapping[str, Any]
) -> tuple[Section, ...]:
    """What was chosen among the candidates, and whether the grid was wide enough."""
    said = chosen(events)
    candidates = runs[runs["kind"] == "candidate"]
    if not said or candidates.empty:
        return ()
    rows, svgs, edges = [], [], []
    for number, (run, choice) in enumerate(said.items()):
        of = candidates[candidates["run"] == run]
        varied = batch["runs"][run]["varied"]
        points: list[dict[str, Any]] = []
        for configuration_id, group in of.groupby("configuration_id", sort=False):
            asked = json.loads(str(group["asked"].iloc[0]))
            mean = choice["results"].get(configuration_id, [None])[0]
            points.append(
                {
                    "run": run,
                    "values": ", ".join(
                        f"{k} {formats.number(asked[k])}" for k in varied if k in asked
                    ),
                    "asked": asked,
                    "validation": mean,
                    "standard_error": None,
                    "chosen": configuration_id == choice["configuration_id"],
                    "outcome": formats.listed(sorted(set(group["outcome"]))),
                }
            )
        rows += points
        edge = _edge(points, varied)
        if edge:
            edges.append(f"{run} ({edge})")
        known = [p for p in points if p["validation"] is not None]
        if len(varied) == 1 and len(known) > 1:
            name = next(iter(varied))
            frame = pd.DataFrame([{**p, "value": p["asked"][name]} for p in known])
            if all(formats.is_number(v) for v in frame["value"]):
                frame = frame.sort_values("value", kind="stable")
            svgs.append(
                drawings.value_figure(
                    frame,
                    f"{formats.clean(run)}: {name}",
                    key=f"choice-{number}",
                    accuracy="validation",
                    y_label="validation accuracy",
                    marked="chosen",
                )
            )
    frame = pd.DataFrame(rows)
    frame["chosen"] = ["chosen" if value else "" for value in frame["chosen"]]
    columns = (
        text("run", "run"),
        text("values", "candidate"),
        Column("validation", "validation accuracy", lambda v: formats.percent(v, 2)),
        text("chosen", "chosen"),
        text("outcome", "outcome"),
    )
    reading = "No chosen value is at the end of its grid."
    if edges:
        reading = (
            f"At the end of its grid: {formats.listed(edges)}. A wider grid might do better there, "
            "so the comparison may be unfair to it."
        )
    exhibit = Exhibit(
        key="choice",
        title="",
        reading=reading,
        svgs=drawn(*svgs),
        legend=(Key("chosen", "vermillion", "D"),) if svgs else (),
        data=(Data("All candidates", table(frame, columns), sortable=True),),
        note="Chosen by the mean validation result over seeds that the comparison does not use; "
        "the test split was not read.",
    )
    lead = "Every run gets the same chance: its own best point of its grid."
    return (Section("choice", "What was chosen", lead, (exhibit,)),)


def _edge(points: Sequence[Mapping[str, Any]], varied: Mapping[str, Sequence[Any]]) -> str:
    """The numeric hyperparameters whose chosen value is the smallest or largest tried."""
    best = next((p["asked"] for p in points if p["chosen"]), None)
    if best is None:
        return ""
    found = []
    for name, values in varied.items():
        numbers = [float(v) for v in values if formats.is_number(v)]
        if len(numbers) < len(values) or len(numbers) < 3 or name not in best:
            continue
        if float(best[name]) in (min(numbers), max(numbers)):
            found.append(f"{name} {formats.number(best[name])}")
    return ", ".join(found)


def study_sections(runs: pd.DataFrame, batch: Mapping[str, Any]) -> tuple[Section, ...]:
    """A section for every kind of study, an exhibit for every run of it."""
    made = []
    for kind, title in STUDIES.items():
        exhibits = []
        for study in batch["studies"]:
            if study["kind"] == kind:
                of = runs[(runs["run"] == study["run"]) & runs["kind"].isin(["final", kind])]
                if (of["kind"] == kind).any():
                    exhibits.append(_study_exhibit(runs, of, study["run"], kind))
        if exhibits:
            lead = "Around the run's own configuration, with its seeds; one change at a time."
            made.append(Section(kind, title, lead, tuple(exhibits)))
    return tuple(made)


def _study_exhibit(runs: pd.DataFrame, of: pd.DataFrame, run: str, kind: str) -> Exhibit:
    done = completed(of)
    own = [str(label) for label in dict.fromkeys(of[of["kind"] == "final"]["label"])]
    labels = [str(label) for label in dict.fromkeys(done[done["kind"] == kind]["label"])]
    tests = against(done, own[0], labels) if own else []
    by_label = {test.label: test for test in tests}
    rows = []
    for row in summary(of).to_dict("records"):
        test = by_label.get(str(row["label"]))
        rows.append(
            {
                **{str(k): v for k, v in row.items()},
                "difference": 100 * test.difference if test else None,
                "low": 100 * test.low if test else None,
                "high": 100 * test.high if test else None,
                "adjusted": p_text(test.adjusted) if test else "",
            }
        )
    columns = (
        text("label", "configuration"),
        Column("test_accuracy", "test accuracy", lambda v: formats.percent(v, 2)),
        Column("standard_error", "± standard error", lambda v: formats.percent(v, 2)),
        Column("difference", "points", formats.signed),
        Column("low", "from", formats.signed),
        Column("high", "to (95 %)", formats.signed),
        text("adjusted", "p after Holm"),
        whole("num", "seeds"),
        whole("samples", "samples a training"),
    )
    svgs: list[str] = []
    reading = _ablation_reading(tests, run)
    if kind != "ablation":
        values = one_at_a_time(runs, run, kind)
        readings = []
        for number, (name, group) in enumerate(values.groupby("parameter", sort=False)):
            known = group.dropna(subset=["test_accuracy"])
            if len(known) > 1:
                svgs.append(
                    drawings.value_figure(
                        known,
                        str(name),
                        key=f"{kind}-{formats.clean(run)}-{number}",
                        accuracy="test_accuracy",
                        y_label="test accuracy",
                        marked="own",
                    )
                )
                readings.append(_value_reading(str(name), known, kind))
        reading = " ".join(readings) or "Too few values were completed."
    elif tests:
        svgs.append(drawings.difference_figure(tests, f"ablation-{formats.clean(run)}"))
    return Exhibit(
        key=f"{kind}-{run}",
        title=formats.clean(run),
        reading=reading,
        svgs=drawn(*svgs),
        legend=(Key("the run's own value", "vermillion", "D"),) if kind != "ablation" else (),
        wide=kind == "ablation",
        data=(Data("", table(pd.DataFrame(rows), columns), shown=True),),
        note="Differences are to the run itself; one family of paired tests for this run."
        + (
            " The law is fitted to mean test errors, without regard to their own errors."
            if kind == "scaling"
            else ""
        ),
    )


def _ablation_reading(tests: Sequence[PairedTest], run: str) -> str:
    if not tests:
        return "Nothing to compare yet."
    parts = []
    for test in tests:
        part = formats.clean(test.label).removeprefix(f"{formats.clean(run)} ")
        change = f"{formats.signed(100 * test.difference)} points"
        parts.append(f"{part} {change}{'' if test.decided else ' (not decided)'}")
    return f"Against {formats.clean(run)}: {'; '.join(parts)}."


def _value_reading(name: str, known: pd.DataFrame, kind: str) -> str:
    best, worst = largest(known, "test_accuracy"), smallest(known, "test_accuracy")
    if best["test_accuracy"] == worst["test_accuracy"]:
        same = formats.percent(best["test_accuracy"], 2)
        return f"{formats.clean(name)}: {same} at every value."
    said = (
        f"{formats.clean(name)}: best at {formats.number(best['value'])} "
        f"({formats.percent(best['test_accuracy'], 2)}), worst at "
        f"{formats.number(worst['value'])} ({formats.percent(worst['test_accuracy'], 2)})"
    )
    numeric = all(formats.is_number(value) for value in known["value"])
    if kind == "scaling" and numeric:
        law = power_law(known["value"].to_numpy(float), 1 - known["test_accuracy"].to_numpy(float))
        if law is not None:
            error = f" ± {law.standard_error:.2f}" if formats.is_number(law.standard_error) else ""
            said += f"; test error goes as its power {formats.signed(law.exponent)}{error}"
    return said + "."


def convergence_section(runs: pd.DataFrame) -> Section:
    """Epochs and samples to shares of the best validation accuracy."""
    done = completed(runs)
    data = steps_to(done)
    columns = (
        text("label", "configuration"),
        Column("share", "of the best", lambda v: formats.percent(v, 0)),
        share("target", "that is"),
        whole("num_reached", "got there"),
        whole("num", "of"),
        Column("epochs", "epochs", lambda v: formats.number(v, 3)),
        whole("steps", "batches"),
        whole("samples", "samples"),
        seconds("seconds", "time"),
    )
    labels = [str(label) for label in dict.fromkeys(done[done["kind"] == "final"]["label"])]
    marks = drawings.curve_marks(labels)
    exhibit = Exhibit(
        key="speed",
        title="",
        reading=_speed_reading(data[data["label"].isin(labels)]),
        svgs=drawn(drawings.curves_figure(done, labels)) if labels else (),
        legend=tuple(
            Key(label, role, "line" if dash == "solid" else "dashed")
            for label, (role, dash) in marks.items()
        ),
        wide=True,
        data=(Data("All times", table(data, columns), sortable=True),) if len(data) else (),
        note="Targets are shares of the best validation accuracy of all trainings on the dataset. "
        "Means are over the trainings that got there.",
    )
    lead = "Validation accuracy after every epoch, mean over seeds."
    return Section("speed", "How fast does it get there?", lead, (exhibit,))


def _speed_reading(data: pd.DataFrame) -> str:
    if data.empty:
        return "No training has been completed."
    parts = []
    for wanted in SHARES:
        of = data[(data["share"] == wanted) & (data["num_reached"] == data["num"])]
        if of.empty:
            parts.append(f"{formats.percent(wanted, 0)}: no configuration with all its seeds")
            continue
        first = smallest(of, "samples")
        parts.append(
            f"{formats.percent(wanted, 0)}: {formats.clean(first['label'])} "
            f"({formats.amount(first['samples'])} samples)"
        )
    return f"First to reach a share of the best: {'; '.join(parts)}."


def cost_section(runs: pd.DataFrame) -> tuple[Section, ...]:
    """Cost against accuracy, by samples and by time."""
    done = completed(runs)
    if done["label"].nunique() < 2:
        return ()
    exhibits = []
    for cost, label, title in (
        ("samples", "samples in gradients, one training", "By samples"),
        ("seconds", "seconds, one training", "By time"),
    ):
        data = tradeoff(done, cost)
        columns = (
            text("label", "configuration"),
            Column(cost, label, formats.count if cost == "samples" else formats.duration),
            Column("test_accuracy", "test accuracy", lambda v: formats.percent(v, 2)),
            Column("standard_error", "± standard error", lambda v: formats.percent(v, 2)),
            text("front", "on the front"),
        )
        front = [str(v) for v in data[data["on_front"]]["label"]]
        rows = data.assign(front=["yes" if value else "" for value in data["on_front"]])
        exhibits.append(
            Exhibit(
                key=f"cost-{cost}",
                title=title,
                reading=f"Nothing is both cheaper and better than {formats.listed(front)}.",
                svgs=drawn(drawings.tradeoff_figure(data, cost, label, f"cost-{cost}")),
                legend=(Key("on the front", "vermillion", "D"), Key("others", "blue", "o")),
                wide=True,
                data=(Data("All", table(rows, columns), sortable=True),),
                note="By means: a neighbour within the errors may as well be on the front."
                + ("" if cost == "samples" else " Times depend on what else the machine did."),
            )
        )
    lead = "What one full training costs against what it reaches."
    return (Section("cost", "Cost and accuracy", lead, tuple(exhibits)),)


def failure_section(runs: pd.DataFrame) -> tuple[Section, ...]:
    """The trainings that were not completed, with their reasons; nothing when there is none."""
    bad = runs[~runs["outcome"].isin(["completed", "missing"])]
    if bad.empty:
        return ()
    frame = bad.assign(
        reason=[
            formats.short((str(text).strip().splitlines() or [""])[-1], 200)
            for text in bad["failure"]
        ]
    )
    columns = (
        text("job_id", "training"),
        text("label", "configuration"),
        whole("seed", "seed"),
        text("outcome", "outcome"),
        text("reason", "reason"),
    )
    counts = bad["outcome"].value_counts()
    told = formats.listed([f"{num} {str(kind).replace('_', ' ')}" for kind, num in counts.items()])
    exhibit = Exhibit(
        key="failures",
        title="",
        reading=f"Not completed: {told}.",
        data=(Data("", table(frame, columns), shown=True),),
        note="Means are over the trainings that were completed. A configuration that loses its "
        "unlucky seeds looks better than it is.",
    )
    return (Section("failures", "What failed", "Failures are results too.", (exhibit,)),)


def p_text(value: float) -> str:
    """A p-value in two significant digits, never as zero.

    >>> p_text(0.0312), p_text(1e-9)
    ('0.031', '< 0.0001')
    """
    if np.isnan(value):
        return formats.MISSING
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"
