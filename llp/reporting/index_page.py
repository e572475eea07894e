"""The index of a matrix: does probing on little data find what much data finds, and at what cost?

Every sentence is made from the numbers; where they do not decide, it says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from llp.reporting import comparison, formats
from llp.reporting.comparison import Stage, Winner
from llp.reporting.documents import Document, state_sentence
from llp.reporting.exhibits import Data, Exhibit, Key, Section, drawn, seconds, share, signed, whole
from llp.reporting.figures import comparison as drawings
from llp.reporting.figures.cost import PARTS
from llp.reporting.runs import Entry
from llp.reporting.study import wilson_interval
from llp.reporting.tables import table, text
from llp.reporting.uncertainty import Difference, Spread


def index_document(entries: Sequence[Entry]) -> Document:
    """The index, whatever states the configurations are in."""
    found = comparison.winners(entries)
    best, least = comparison.reference(found), comparison.cheapest(found)
    between = comparison.spread(entries)
    figure, headline, sure = "", _nothing(entries, found), ""
    if best is not None and least is not None:
        figure, headline = answer(least, best, between)
        sure = sureness(entries, found, best, between)
    return Document(
        figure=figure,
        headline=headline,
        sure=sure,
        sections=(
            _winners(entries, found, best, between),
            _cost(entries),
            _ranks(entries, best),
            *(() if best is None else (_finds(entries, best),)),
        ),
    )


def _nothing(entries: Sequence[Entry], found: Mapping[str, Winner]) -> str:
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry.status] = counts.get(entry.status, 0) + 1
    told = formats.listed([f"{num} {status}" for status, num in counts.items()])
    text = (
        "There is nothing to compare yet: of "
        f"{formats.plural(len(entries), 'configuration')} {told}."
    )
    for name, winner in found.items():
        text += (
            f" {formats.clean(name)} found {winner.trial_id} with "
            f"{formats.percent(winner.mean)} test accuracy."
        )
    return text


def answer(least: Winner, best: Winner, between: Spread) -> tuple[str, str]:
    """The big number and the sentence on the cheapest configuration against the reference."""
    cheap, dear = least.entry.result, best.entry.result
    assert cheap is not None
    assert dear is not None
    ratio = cheap.cost.tier1 / dear.cost.tier1 if dear.cost.tier1 else float("nan")
    cost = (
        f"Tier 1 cost {formats.percent(ratio, 0)} of what it costs there "
        f"({formats.amount(cheap.cost.tier1)} against {formats.amount(dear.cost.tier1)} samples)"
    )
    with_rest = sum((cheap.cost.tier1, cheap.cost.tier2, cheap.cost.verification))
    of_rest = sum((dear.cost.tier1, dear.cost.tier2, dear.cost.verification))
    cost += f", the whole search {formats.percent(with_rest / of_rest, 0)}."
    here, there = comparison.probed_on(least.entry), comparison.probed_on(best.entry)
    if comparison.same_configuration(least, best):
        return (
            "same winner",
            f"Probing on {here} found the configuration that probing on {there} found: "
            f"{least.trial_id}, {formats.percent(least.mean)} test accuracy. {cost}",
        )
    found = comparison.against(least, best, between)
    return (
        f"{formats.signed(100 * found.value, 1)} points",
        f"Probing on {here} found {least.trial_id}, {formats.percent(least.mean)} test accuracy; "
        f"probing on {there} found {best.trial_id}, {formats.percent(best.mean)}. "
        f"{_told(found)} {cost}",
    )


def _told(found: Difference) -> str:
    interval = (
        f"95 % interval {formats.signed(100 * found.low)} to {formats.signed(100 * found.high)}"
    )
    if not found.decided:
        return (
            f"The difference, {formats.signed(100 * found.value)} points ({interval}), cannot be "
            "told from zero."
        )
    side = "better" if found.value > 0 else "worse"
    return f"It is {side} by {formats.points(abs(found.value), 2)} points ({interval})."


def sureness(
    entries: Sequence[Entry], found: Mapping[str, Winner], best: Winner, between: Spread
) -> str:
    """What the comparison rests on, and what it cannot tell."""
    others = [w for w in found.values() if w is not best]
    apart = [
        w.entry.name
        for w in others
        if not comparison.same_configuration(w, best)
        and comparison.against(w, best, between).decided
    ]
    same = [w.entry.name for w in others if comparison.same_configuration(w, best)]
    parts = []
    if same:
        parts.append(f"the same configuration was found by {formats.listed(same)}")
    if apart:
        parts.append(f"another, which can be told apart from it, by {formats.listed(apart)}")
    rest = [w.entry.name for w in others if w.entry.name not in (*apart, *same)]
    if rest:
        parts.append(f"another, which cannot be told apart from it, by {formats.listed(rest)}")
    text = f"Beside {formats.clean(best.entry.name)}: {'; '.join(parts)}. " if parts else ""
    if between.degrees:
        text += (
            f"Trainings of one configuration differ by {formats.points(between.variance**0.5, 2)} "
            f"points (standard deviation, degrees of freedom: {between.degrees}). "
        )
    else:
        text += "With one training each, the spread between seeds is not part of the intervals. "
    missing = [entry.name for entry in entries if entry.name not in found]
    if missing:
        text += f"Without a result so far: {formats.listed(missing)}. "
    return text + (
        "All of it is one draw of configurations, on one dataset with one network: another seed of "
        "the search may answer otherwise."
    )


def _winners(
    entries: Sequence[Entry], found: Mapping[str, Winner], best: Winner | None, between: Spread
) -> Section:
    data = comparison.summary_data(entries)
    rows = []
    for row in data.to_dict("records"):
        won = found.get(str(row["name"]))
        images = wilson_interval(won.mean, won.num_images) if won else None
        apart = [row[key] for key in ("low", "high")]
        rows.append(
            {
                **{str(key): value for key, value in row.items()},
                "seeds": len(won.accuracies) if won else None,
                "over_seeds": drawings.seeds_text(won) if won else "",
                "over_images": " to ".join(map(formats.percent, images)) if images else "",
                "points": 100 * row["difference"] if formats.is_number(row["difference"]) else None,
                "interval": " to ".join(formats.signed(100 * end) for end in apart)
                if all(map(formats.is_number, apart))
                else "",
            }
        )
    frame = pd.DataFrame(rows, dtype=object)
    columns = (
        text("name", "configuration"),
        text("winner", "winner"),
        share("accuracy", "test accuracy"),
        whole("seeds", "seeds"),
        text("over_seeds", "95 %, seeds"),
        text("over_images", "95 %, test images"),
        signed("points", "points to the reference"),
        text("interval", "95 %"),
        text("verdict", "verdict"),
        text("probed", "probed on"),
        whole("trials", "trials"),
    )
    reading = "No configuration has a verified winner yet."
    listed = Data("Every configuration", table(frame, columns), shown=True, sortable=True)
    if best is None:
        return Section("winners", "What each found", "", (Exhibit("winners", "", reading),))
    top = max(found.values(), key=lambda winner: winner.mean)
    accuracies = Exhibit(
        key="winners",
        title="",
        reading=f"{formats.plural(len(found), 'configuration')} of {len(entries)} found a winner; "
        f"the highest mean test accuracy is {formats.percent(top.mean)} "
        f"({formats.clean(top.entry.name)}: {top.trial_id}).",
        svgs=drawn(
            drawings.accuracy_figure(
                list(found.values()), [entry.name for entry in entries], best.entry.name
            )
        ),
        legend=(
            Key("one full training", "muted", "ring"),
            Key("mean", "blue", "s"),
            Key("mean of the reference, which probed on most data", "vermillion", "D"),
        ),
        data=(listed,),
        note="Intervals “over seeds” are Student's for the mean of the trainings, those of the "
        "test images Wilson's. Winners were chosen by validation data.",
        wide=True,
    )
    others = [
        (winner.entry.name, comparison.against(winner, best, between))
        for winner in found.values()
        if winner is not best and not comparison.same_configuration(winner, best)
    ]
    if not others:
        return Section("winners", "What each found", "", (accuracies,))
    differences = Exhibit(
        key="differences",
        title=f"Against {formats.clean(best.entry.name)}",
        reading=differences_reading(others),
        svgs=drawn(drawings.difference_figure(others, best.entry.name)),
        legend=(
            Key("cannot be told from zero", "blue", "o"),
            Key("can", "vermillion", "D"),
        ),
        note="95 % intervals. They hold the spread between trainings, pooled over all good "
        f"configurations that were trained fully (within {100 * comparison.NEAR:.0f} points of the "
        f"best), and the finite number of test images{_pairing(others)}. Each is judged by itself: "
        "of twenty that are truly equal, one would be told apart by chance.",
        wide=True,
    )
    return Section("winners", "What each found", "", (accuracies, differences))


def _pairing(others: Sequence[tuple[str, Difference]]) -> str:
    paired = [found.paired for _, found in others]
    if all(paired):
        return ", compared image by image"
    if any(paired):
        return ", compared image by image where predictions were kept"
    return " (as two samples: no predictions were kept to compare image by image)"


def differences_reading(others: Sequence[tuple[str, Difference]]) -> str:
    """The largest difference, and how many can be told from zero."""
    name, most = max(others, key=lambda item: abs(item[1].value))
    decided = sum(found.decided for _, found in others)
    return (
        f"The largest difference is that of {formats.clean(name)}, "
        f"{formats.signed(100 * most.value)} points; {decided or 'none'} of {len(others)} can be "
        "told from zero."
    )


def _cost(entries: Sequence[Entry]) -> Section:
    data = comparison.summary_data(entries)
    columns = (
        text("name", "configuration"),
        whole("tier1", "tier 1, samples"),
        share("tier1_ratio", "of the reference"),
        whole("tier2", "tier 2"),
        whole("verification", "verification"),
        whole("total", "together"),
        share("total_ratio", "of the reference"),
        seconds("seconds_tier1", "tier 1, time"),
        seconds("seconds_total", "together"),
    )
    known = [float(value) for value in data["total"] if formats.is_number(value)]
    time = sum(float(value) for value in data["seconds_total"] if formats.is_number(value))
    reading = "Nothing has been run yet."
    if known:
        reading = (
            f"All configurations together saw {formats.amount(sum(known))} samples in "
            f"{formats.duration(time)}."
        )
    exhibit = Exhibit(
        key="costs",
        title="",
        reading=reading,
        svgs=drawn(drawings.costs_figure(data)) if known else (),
        legend=tuple(Key(label, role, "bar", hatch) for hatch, (_, label, role) in enumerate(PARTS))
        if known
        else (),
        data=(Data("Cost by part", table(data, columns), shown=True),),
        note="Samples are training images that went through a training step, tier 2 in gradient "
        "equivalents. Times are those of the machine the studies ran on.",
        wide=True,
    )
    return Section("costs", "What each cost", "", (exhibit,))


def _ranks(entries: Sequence[Entry], best: Winner | None) -> Section:
    found = comparison.distinct(comparison.stages(entries))
    data = comparison.agreement_data(found)
    top = _top_stage(found, best)
    columns = (
        text("first", "between"),
        text("second", "and"),
        whole("num_trials", "common trials"),
        signed("tau", "Kendall tau"),
        signed("low", "from"),
        signed("high", "to (90 %)"),
        whole("top", "best 3 in common"),
        whole("second_best", "place of the second's best in the first"),
    )
    num, equal, gap = comparison.repeats(entries)
    note = "Only trials that finished both and have the same hyperparameters are compared."
    if num:
        note += (
            f" {formats.plural(num, 'training')} of the same configuration, images and seed were "
            f"done by several studies: {equal} of them agree exactly, the largest difference is "
            f"{formats.points(gap, 2)} points."
        )
    exhibit = Exhibit(
        key="agreement",
        title="",
        reading=ranks_reading(data, top),
        svgs=drawn(*drawings.agreement_figures(found, top)) if top else (),
        legend=(Key("winner of the reference", "vermillion", "ring"),) if top else (),
        data=(Data("All pairs", table(data, columns), sortable=True),) if len(data) else (),
        note=note,
    )
    return Section(
        "ranks",
        "Does little data order configurations as much data does?",
        "Validation accuracy of the same trials at the end of a probe.",
        (exhibit,),
    )


def _top_stage(found: Sequence[Stage], best: Winner | None) -> Stage | None:
    if best is None:
        return None
    return next((s for s in found if s.entry.name == best.entry.name and s.top), None)


def ranks_reading(data: pd.DataFrame, top: Stage | None) -> str:
    """The weakest and the strongest agreement with the reference."""
    rows = data[
        (data["second"] == (top.label if top else ""))
        | (data["first"] == (top.label if top else ""))
    ]
    rows = rows.dropna(subset=["tau"])
    if top is None or rows.empty:
        return "Fewer than three trials finished two of the configurations: nothing to compare."

    def told(row: Mapping[Any, Any]) -> str:
        other = row["first"] if row["second"] == top.label else row["second"]
        interval = "too few trials for an interval"
        if formats.is_number(row["low"]):
            interval = (
                f"90 % interval {formats.signed(row['low'])} to {formats.signed(row['high'])}"
            )
        tau = formats.signed(row["tau"])
        return f"{other} with Kendall tau {tau} ({interval}, n = {row['num_trials']})"

    ordered = rows.sort_values("tau", kind="stable").to_dict("records")
    if len(ordered) == 1:
        return f"As {top.label} does orders {told(ordered[0])}."
    return f"Least like {top.label} orders {told(ordered[0])}; most like it {told(ordered[-1])}."


def _finds(entries: Sequence[Entry], best: Winner) -> Section:
    rows = []
    for entry in entries:
        if entry.name == best.entry.name or entry.result is None:
            continue
        stages = comparison.stages([entry])
        reached = [s for s in stages if best.trial_id in s.accuracies]
        row: dict[str, object] = {"name": entry.name}
        if reached:
            stage = reached[-1]
            order = comparison.order(stage)
            row |= {
                "stage": f"{100 * stage.rung.data_fraction:.3g} %",
                "place": order.index(best.trial_id) + 1,
                "of": len(order),
            }
        verified = {v.trial_id for v in entry.result.verifications}
        row["verified"] = "yes" if best.trial_id in verified else "no"
        row["top_k"] = len(verified)
        rows.append(row)
    frame = pd.DataFrame(
        rows, columns=["name", "stage", "place", "of", "verified", "top_k"], dtype=object
    )
    columns = (
        text("name", "configuration"),
        text("stage", "highest rung it got to"),
        whole("place", "number there"),
        whole("of", "of"),
        text("verified", "among those trained fully"),
        whole("top_k", "of how many"),
    )
    return Section(
        "finds",
        f"Where is {formats.clean(best.trial_id)}, the winner of {formats.clean(best.entry.name)}?",
        "The best configuration of the dearest probing, in the order of the cheaper ones.",
        (
            Exhibit(
                key="finds",
                title="",
                reading=finds_reading(rows, best),
                data=(Data("", table(frame, columns), shown=True),) if rows else (),
                note="Places are by validation accuracy at the end of the rung; what is trained "
                "fully is chosen by the score, which is validation accuracy until tier 2 has "
                "earned a weight.",
            ),
        ),
    )


def finds_reading(rows: Sequence[Mapping[str, object]], best: Winner) -> str:
    """Which configurations would have trained the reference's winner."""
    if not rows:
        return "There is no other configuration to look in."
    kept = [str(row["name"]) for row in rows if row["verified"] == "yes"]
    lost = [str(row["name"]) for row in rows if row["verified"] == "no"]
    parts = []
    if kept:
        parts.append(f"{formats.listed(kept)} had it among those trained fully")
    if lost:
        parts.append(f"{formats.listed(lost)} passed it over")
    return "; ".join(parts) + "."


def document_rows(entries: Sequence[Entry]) -> list[dict[str, object]]:
    """The table of documents: one row a configuration."""
    return [
        {
            "name": entry.name,
            "status": entry.status,
            "probed": comparison.probed_on(entry),
            "study_page": entry.study_page,
        }
        for entry in entries
    ]


def notes(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """What is the matter with which configurations; those with the same trouble share a note."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        sentence = state_sentence(entry)
        if sentence:
            found.setdefault(sentence, []).append(entry.name)
    return [(formats.listed(names, len(names)), text) for text, names in found.items()]
