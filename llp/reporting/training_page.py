"""The training report of one configuration: its full trainings, its recipe, what it cost."""

from __future__ import annotations

import pandas as pd

from llp.reporting import formats, yaml_text
from llp.reporting.documents import Document, status_document
from llp.reporting.exhibits import Data, Exhibit, Key, Section, drawn, seconds, share, whole
from llp.reporting.figures import training
from llp.reporting.figures.scores import margin_sentence, verification_figure
from llp.reporting.probing_sections import cost_exhibit, curves_section, ladder_section
from llp.reporting.provenance import provenance
from llp.reporting.runs import Entry
from llp.reporting.study import find_trial, verified
from llp.reporting.tables import Column, table, text
from llp.reporting.tracking_section import tracking_sections
from llp.reporting.verdict import verdict

CURVE_COLUMNS = (
    text("job_id", "training"),
    whole("epoch", "epoch"),
    whole("samples_seen", "samples seen"),
    Column("learning_rate", "learning rate"),
    Column("train_loss", "training loss"),
    share("train_accuracy", "training accuracy"),
    Column("validation_loss", "validation loss"),
    share("validation_accuracy", "validation accuracy"),
    seconds("seconds", "time"),
)
"""Of the table of a training's epochs."""


def training_document(entry: Entry) -> Document:
    """The training report, whatever state the study is in."""
    result = entry.result
    if result is None:
        return status_document(entry, "training")
    told = verdict(result)
    return Document(
        figure=told.figure,
        headline=told.headline,
        sure=told.sure,
        facts=told.facts,
        yaml=told.yaml,
        yaml_title=told.yaml_title,
        sections=(
            _trainings(entry),
            *tracking_sections(seen for each in entry.of_winner() for seen in each.observations),
            _recipe(entry),
            ladder_section(result),
            curves_section(result),
            Section("cost", "Cost", "", (cost_exhibit(result),)),
        ),
        provenance=provenance(result),
    )


def _trainings(entry: Entry) -> Section:
    assert entry.result is not None
    data = training.training_data(entry.trainings, entry.result.winner)
    own = training.winners_rows(data)
    seeds = own["job_id"].nunique()
    curves = Exhibit(
        key="trainings",
        title="",
        reading=training.training_reading(data),
        svgs=drawn(*training.training_figures(data)),
        legend=(
            Key("training", "blue"),
            Key("validation, winner", "vermillion"),
            Key("other configurations", "faint"),
            *((Key("line styles: seeds", "muted", "dashed"),) if seeds > 1 else ()),
        )
        if len(own)
        else (),
        data=(Data("Every epoch of the winner", table(own, CURVE_COLUMNS)),) if len(own) else (),
        note="The training loss is as optimised, with augmentation and label smoothing where the "
        "recipe has them; the validation loss is plain cross-entropy."
        if len(own)
        else "",
    )
    rows = pd.DataFrame(
        [
            {
                "trial_id": t.trial_id,
                "job_id": t.job_id,
                "seed": t.seed,
                "state": t.end.outcome.replace("_", " ") if t.end else "not finished",
                "validation": t.verification.validation_accuracy if t.verification else None,
                "test": t.verification.test_accuracy if t.verification else None,
                "samples_seen": t.points[-1].samples_seen if t.points else None,
                "seconds": t.points[-1].seconds if t.points else None,
            }
            for t in entry.trainings
        ],
        dtype=object,
    )
    run_columns = (
        text("trial_id", "configuration"),
        text("job_id", "training"),
        Column("seed", "seed", str),
        text("state", "state"),
        share("validation", "validation accuracy"),
        share("test", "test accuracy"),
        whole("samples_seen", "samples seen"),
        seconds("seconds", "time"),
    )
    tested = verified(entry.result)
    everyone = Exhibit(
        key="verified",
        title="All full trainings",
        reading=margin_sentence(tested),
        svgs=drawn(verification_figure(tested)) if tested else (),
        legend=(
            Key("one seed", "muted", "ring"),
            Key("mean ± standard error", "blue", "s"),
            Key("highest test accuracy", "vermillion", "D"),
        )
        if tested
        else (),
        data=(Data("Every full training", table(rows, run_columns), sortable=True),)
        if len(rows)
        else (),
        note="Validation accuracy chose the winner; test accuracy is only reported.",
        wide=True,
    )
    return Section(
        "trainings",
        "Full trainings",
        "The best few by the score of tiers 1 and 2, trained on all training images.",
        (curves, everyone),
    )


def _recipe(entry: Entry) -> Section:
    assert entry.result is not None
    winner = find_trial(entry.result, entry.result.winner)
    recipe = entry.spec.get("training")
    recipe = dict(recipe) if isinstance(recipe, dict) else {}
    chosen = dict(winner.trial.hyperparameters) if winner else {}
    rows = [(name, formats.number(value), "searched") for name, value in chosen.items()]
    rows += [
        (name, yaml_text.dump({"v": value})[3:].strip(), "fixed")
        for name, value in recipe.items()
        if name not in chosen
    ]
    frame = pd.DataFrame(rows, columns=["name", "value", "origin"])
    columns = (text("name", "setting"), text("value", "value"), text("origin", "searched or fixed"))
    high, last = training.rate_range(training.training_data(entry.trainings, entry.result.winner))
    schedule = chosen.get("schedule", recipe.get("schedule", ""))
    reading = "No configuration has won."
    if winner:
        reading = (
            f"{formats.plural(len(chosen), 'setting')} searched. Schedule "
            f"{formats.short(schedule, 40)}: the learning rate ends its highest epoch at "
            f"{formats.number(high)} and its last at {formats.number(last)}."
        )
    exhibit = Exhibit(
        key="recipe",
        title="",
        reading=reading,
        data=(Data("The winner's recipe", table(frame, columns), shown=True),) if winner else (),
    )
    return Section("recipe", "Hyperparameters and schedule", "", (exhibit,))
