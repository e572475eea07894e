"""Ties at promotions that tier 2 settled, or why it did not."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from llp.records import SearchResult
from llp.reporting import formats
from llp.reporting.exhibits import Data, Exhibit, Section, signed, whole
from llp.reporting.tables import table, text


def with_ties(section: Section, result: SearchResult) -> Section:
    """`section` with the ties behind its other exhibits, where the tie-break was asked for."""
    if result.tie_break is None:
        return section
    return replace(section, exhibits=(*section.exhibits, tie_exhibit(result)))


def tie_exhibit(result: SearchResult) -> Exhibit:
    """Every choice that the tie-break changed."""
    data = tie_data(result)
    columns = (
        whole("rung", "rung"),
        text("kept", "kept"),
        text("passed_over", "passed over"),
        signed("behind", "accuracy of the kept minus the other's, points"),
        signed("error", "standard error, points"),
        signed("value", "tie-break value of the kept"),
        signed("other", "of the other"),
    )
    return Exhibit(
        key="ties",
        title="Ties that tier 2 settled",
        reading=tie_sentence(result),
        data=(Data("Choices it changed", table(data, columns), shown=True),) if len(data) else (),
        note="Tied are trials on both sides of a cut whose accuracies differ by no more than the "
        "standard error of the difference. The value is the calibrated contribution of tier 2 "
        "among them; trials of equal value are ordered by accuracy.",
    )


def tie_data(result: SearchResult) -> pd.DataFrame:
    """One row a choice that was changed; the best kept against the best passed over, and so on.

    Columns: `rung`, `kept`, `passed_over`, `behind` (accuracy of the first minus that of the
    second) and its standard `error` at the cut in percentage points, `value`, `other` (tie-break
    values).
    """
    rows = []
    for choice in result.tie_choices:
        gained = [name for name in choice.kept if name not in choice.usual]
        lost = [name for name in choice.usual if name not in choice.kept]
        for kept, other in zip(gained, lost, strict=True):
            rows.append(
                {
                    "rung": choice.rung,
                    "kept": kept,
                    "passed_over": other,
                    "behind": 100 * (choice.accuracies[kept] - choice.accuracies[other]),
                    "error": 100 * choice.standard_error,
                    "value": choice.values[kept],
                    "other": choice.values[other],
                }
            )
    names = ["rung", "kept", "passed_over", "behind", "error", "value", "other"]
    return pd.DataFrame(rows, columns=names)


def tie_sentence(result: SearchResult) -> str:
    """What the tie-break did, or why it was not used; empty where it was not asked for."""
    found = result.tie_break
    if found is None:
        return ""
    if not found.used:
        return f"Tier 2 was not used to settle ties at promotions: {found.reason}."
    changed, num = len(tie_data(result)), len(result.tie_choices)
    did = f"it settled {formats.plural(num, 'tie')} and "
    did += f"changed {formats.plural(changed, 'choice')}" if changed else "changed no choice"
    if not num:
        did = "there was no tie of four trials or more, so it changed no choice"
    return f"Tier 2 may settle ties at promotions, as {found.reason}: {did}."
