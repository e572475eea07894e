"""Which earlier studies a search used, which it could not use and why: a table on its page."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from llp.records import EarlierStudies, SearchResult
from llp.reporting.earlier import about_earlier
from llp.reporting.exhibits import Data, Exhibit, Section
from llp.reporting.tables import table, text


def with_earlier(section: Section, result: SearchResult) -> Section:
    """`section` with the earlier studies behind its other exhibits, where some were asked for."""
    if result.earlier is None:
        return section
    return replace(section, exhibits=(*section.exhibits, _exhibit(result.earlier)))


def earlier_data(found: EarlierStudies) -> pd.DataFrame:
    """One row a study: `study` and `taken`, which says whether something is taken or why not."""
    rows = [{"study": name, "taken": "used"} for name in found.used]
    rows += [{"study": name, "taken": f"left out: {why}"} for name, why in found.left_out.items()]
    return pd.DataFrame(rows, columns=["study", "taken"])


def _exhibit(found: EarlierStudies) -> Exhibit:
    columns = (text("study", "study"), text("taken", "what became of it"))
    sentences = [line[0].upper() + line[1:] + "." for line in about_earlier(found)]
    return Exhibit(
        key="earlier-studies",
        title="Taken from earlier studies",
        reading=" ".join(sentences),
        data=(Data("Every study", table(earlier_data(found), columns), shown=True),),
    )
