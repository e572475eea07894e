"""Several objectives: the configurations that no other one beats."""

from __future__ import annotations

import pandas as pd

from llp.records import ParetoFront, SearchResult
from llp.reporting import formats
from llp.reporting.exhibits import Data, Exhibit, Key, Section, drawn, share
from llp.reporting.palette import LIGHT
from llp.reporting.svg import canvas, drawing, inline, percent_axis
from llp.reporting.tables import Column, finite, table, text

_LABELS = {
    "error": "validation error",
    "seconds": "training time, s",
    "samples": "training examples",
    "parameters": "parameters",
    "latency": "latency of one image, ms",
}


def front_sections(result: SearchResult) -> tuple[Section, ...]:
    """One section with a figure for each front; none without several objectives."""
    if not result.fronts:
        return ()
    lead = (
        "A configuration is on the front when no other one is at least as good in every objective "
        "and better in one. Which of them to take is a decision that the numbers do not make."
    )
    exhibits = tuple(_exhibit(front, result.winner) for front in result.fronts)
    return (Section("front", "Several objectives", lead, exhibits),)


def front_data(front: ParetoFront) -> pd.DataFrame:
    """One row a trial, the front first: `trial_id`, `on_front`, and a column per objective.

    `latency` is in milliseconds.
    """
    rows = [
        {
            "trial_id": name,
            "on_front": name in front.front,
            **{key: value * (1e3 if key == "latency" else 1) for key, value in values.items()},
        }
        for name, values in front.values.items()
    ]
    frame = pd.DataFrame(rows, columns=["trial_id", "on_front", *front.names])
    order = ["on_front", front.names[0]]
    return frame.sort_values(order, ascending=[False, True], ignore_index=True)


def _exhibit(front: ParetoFront, winner: str | None) -> Exhibit:
    data = front_data(front)
    where = f"rung {front.rung}" if front.rung else "full trainings"
    columns = (
        text("trial_id", "trial"),
        text("where", "front"),
        *(
            share(name, _LABELS[name])
            if name == "error"
            else Column(name, _LABELS.get(name, name), lambda value: formats.number(value, 4))
            for name in front.names
        ),
    )
    shown = data.assign(where=["on the front" if on else "" for on in data["on_front"]])
    listed = formats.listed([formats.clean(name) for name in front.front], 8)
    reading = (
        f"{formats.plural(len(front.front), 'configuration')} of {len(data)} on the front: "
        f"{listed}. It covers {formats.percent(front.covered, 0)} of the box between the best and "
        "the worst value of each objective."
        if front.front
        else "No configuration has a value of every objective."
    )
    return Exhibit(
        key=f"front{front.rung}",
        title=f"Compared after {where}",
        reading=reading,
        svgs=drawn(*_figures(front, data, winner)) if front.front else (),
        legend=(
            Key("on the front", "vermillion", "D"),
            Key("others", "blue", "o"),
            *((Key("winner", "green", "ring"),) if winner in front.values else ()),
        )
        if front.front
        else (),
        data=(Data("All configurations", table(shown, columns), sortable=True),),
        note="Times and latency were measured on the machine of the search and compare "
        "configurations there.",
    )


def _figures(front: ParetoFront, data: pd.DataFrame, winner: str | None) -> list[str]:
    """The first objective against each of the others."""
    made = []
    first = front.names[0]
    for name in front.names[1:]:
        rows = finite(data, first, name)
        with drawing():
            figure, axes = canvas(left=0.62, bottom=0.42, top=0.1)
            for row in rows.to_dict("records"):
                on = row["on_front"]
                axes.plot(
                    row[name],
                    row[first],
                    "D" if on else "o",
                    color=LIGHT["vermillion" if on else "blue"],
                    markersize=5 if on else 3.5,
                )
                if row["trial_id"] == winner:
                    axes.plot(
                        row[name], row[first], "o", mfc="none", mec=LIGHT["green"], ms=10, mew=1.4
                    )
            if first == "error":
                percent_axis(axes, "y")
            axes.set_xlabel(_LABELS.get(name, name))
            axes.set_ylabel(_LABELS.get(first, first))
            axes.xaxis.set_major_formatter(lambda value, _: formats.number(value, 3))
            axes.grid(visible=True)
            made.append(
                inline(
                    figure,
                    key=f"front{front.rung}{name}",
                    title=f"{_LABELS.get(first, first)} against {_LABELS.get(name, name)}",
                )
            )
    return made
