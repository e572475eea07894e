"""The race over seeds, as a table under the full trainings; the test is in `scoring.racing`."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from llp.records import SearchResult
from llp.reporting import formats
from llp.reporting.exhibits import Data, Exhibit, Section, signed, whole
from llp.reporting.tables import table, text


def with_race(section: Section, result: SearchResult) -> Section:
    """`section` with the race behind its other exhibits, when there was one."""
    if not result.race:
        return section
    return replace(section, exhibits=(*section.exhibits, race_exhibit(result)))


def race_exhibit(result: SearchResult) -> Exhibit:
    """Who left the race when, and how sure the order is."""
    data = race_data(result)
    columns = (
        whole("num_seeds", "seeds"),
        text("trial_id", "trial"),
        signed("behind", "behind the leader, points"),
        signed("ahead_at_most", "ahead at most, points"),
        text("verdict", "verdict"),
    )
    margin = formats.points(result.race[-1].margin, 2)
    return Exhibit(
        key="race",
        title="The race over seeds",
        reading=race_reading(result),
        data=(Data("Every look", table(data, columns), shown=True),),
        note="“Ahead at most” bounds how much better the configuration is than the leader, over "
        "all looks together, at the error rate of the race. A negative bound takes it out; the "
        f"race is settled when no bound is above the margin of {margin} points.",
    )


def race_data(result: SearchResult) -> pd.DataFrame:
    """One row a look and configuration.

    Columns: `num_seeds`, `trial_id`, `behind` and `ahead_at_most` the leader (percentage points;
    NaN for the leader itself), `verdict`.
    """
    rows = []
    for look in result.race:
        for name in dict.fromkeys([look.leader, *look.racing, *look.out]):
            verdict = look.out.get(name, "stays in")
            if name == look.leader:
                verdict = "leads"
            rows.append(
                {
                    "num_seeds": look.num_seeds,
                    "trial_id": name,
                    "behind": 100 * look.behind.get(name, float("nan")),
                    "ahead_at_most": 100 * look.ahead_at_most.get(name, float("nan")),
                    "verdict": verdict,
                }
            )
    return pd.DataFrame(rows)


def race_reading(result: SearchResult) -> str:
    """How the race ended, in one sentence."""
    last = result.race[-1]
    trainings = len(result.verifications)
    entrants = len(result.race[0].racing) + len(result.race[0].out)
    fixed = entrants * int(result.spec.get("verification", {}).get("max_seeds", last.num_seeds))
    cost = f"{trainings} full trainings; {entrants} configurations with all seeds would be {fixed}"
    if result.status == "running":
        return f"The race has had {formats.plural(len(result.race), 'look')} so far ({cost})."
    if not last.settled:
        return f"The race used up its {last.num_seeds} seeds and is not settled ({cost})."
    return f"The race was settled after {last.num_seeds} seeds ({cost})."
