"""What the study spent, against training every configuration fully, and what saved it.

The unit is *samples seen*: training examples that went through a training step, repeats counted.
"""

from __future__ import annotations

import math

import pandas as pd

from llp.records import SearchResult
from llp.reporting import formats
from llp.reporting.palette import HATCHES, LIGHT
from llp.reporting.study import FAILURES
from llp.reporting.svg import BARS, canvas, drawing, inline, label_width

PARTS = (
    ("tier1", "tier 1, probing", "blue"),
    ("tier2", "tier 2, landscape", "vermillion"),
    ("verification", "verification", "green"),
)


def cost_data(result: SearchResult) -> pd.DataFrame:
    """Rows `tier1`, `tier2`, `verification`, `total`, `full_search`.

    Columns: `part`, `label`, `samples_seen`, and `share` of the full search (NaN when that is 0).
    """
    cost = result.cost
    rows = [(part, label, getattr(cost, part)) for part, label, _ in PARTS]
    rows.append(("total", "this study", sum(samples for _, _, samples in rows)))
    rows.append(("full_search", "every configuration trained fully, once", cost.full_search))
    frame = pd.DataFrame(rows, columns=["part", "label", "samples_seen"])
    full = cost.full_search
    frame["share"] = [s / full if full > 0 else math.nan for s in frame["samples_seen"]]
    return frame


def cost_reading(data: pd.DataFrame) -> str:
    """The saving in one sentence."""
    spent, full = _samples(data, "total"), _samples(data, "full_search")
    if full <= 0:
        return f"The study has seen {formats.amount(spent)} training examples so far."
    if spent <= 0:
        return (
            "Nothing has been trained yet; training every configuration fully once would take "
            f"{formats.amount(full)} training examples."
        )
    start = (
        f"The study saw {formats.amount(spent)} training examples; training every configuration "
        f"fully once would see {formats.amount(full)}"
    )
    if spent <= full:
        return f"{start}: {full / spent:.1f} times as many."
    return f"{start}. This study cost {spent / full:.1f} times as much: the ladder saved nothing."


def cost_figure(data: pd.DataFrame) -> str:
    """Two bars: the study's three parts stacked, and the full search."""
    with drawing():
        names = ("this study", "training all fully")
        figure, axes = canvas(
            (BARS, 1.05), left=label_width(names), right=0.02, bottom=0.04, top=0.04
        )
        left = 0.0
        for (part, _, role), hatch in zip(PARTS, HATCHES, strict=False):
            samples = _samples(data, part)
            axes.barh(
                1, samples, 0.55, left=left, color=LIGHT[role], hatch=hatch, edgecolor=LIGHT["page"]
            )
            left += samples
        full = _samples(data, "full_search")
        axes.barh(0, full, 0.55, color="none", edgecolor=LIGHT["faint"], linewidth=1)
        for y, value in ((1, left), (0, full)):
            axes.annotate(
                formats.amount(value),
                (value, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=LIGHT["ink"],
            )
        axes.set_yticks([1, 0], names)
        axes.set_xlim(0, max(left, full, 1) * 1.24)
        axes.set_ylim(-0.5, 1.5)
        axes.set_xticks([])
        axes.tick_params(length=0)
        for side in ("bottom", "left"):
            axes.spines[side].set_visible(False)
        return inline(
            figure, key="cost", title="Samples seen by part", description=cost_reading(data)
        )


def savings_data(result: SearchResult) -> pd.DataFrame:
    """What every reason for ending a trial saved against training that trial fully.

    Columns: `reason`, `num_trials`, `samples_seen` (spent on them), `saved` (full training of the
    same trials minus what was spent; negative when the rungs add up to more than one full
    training). One row a reason, biggest saving first.
    """
    full = result.cost.full_search / len(result.trials) if result.trials else 0.0
    groups: dict[str, list[int]] = {}
    for trial in result.trials:
        if trial.outcome in FAILURES:
            reason = trial.outcome.replace("_", " ")
        elif trial.stopped_by.startswith("rung "):
            reason = f"not promoted from {trial.stopped_by}"
        elif trial.stopped_by:
            reason = f"stopped by {trial.stopped_by}"
        else:
            reason = "reached the top, or still open"
        groups.setdefault(reason, []).append(trial.samples_seen)
    rows = [(r, len(s), sum(s), full * len(s) - sum(s)) for r, s in groups.items()]
    rows.sort(key=lambda row: (-row[3], row[0]))
    return pd.DataFrame(rows, columns=["reason", "num_trials", "samples_seen", "saved"])


def savings_reading(data: pd.DataFrame) -> str:
    """Which reason saved most."""
    useful = data[data["saved"] > 0]
    if useful.empty:
        return "Ending trials early has saved nothing against training them fully."
    first = useful.iloc[0]
    share = first["saved"] / useful["saved"].sum()
    return (
        f"Most was saved on {formats.plural(int(first['num_trials']), 'trial')} that ended as "
        f"“{formats.clean(first['reason'])}”: {formats.percent(share, 0)} of all that ending "
        "trials early saved."
    )


def _samples(data: pd.DataFrame, part: str) -> float:
    return float(data.loc[data["part"] == part, "samples_seen"].iloc[0])
