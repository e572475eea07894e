"""What a study's page holds, in order.

Every section exists in every report: where the study has nothing for it, it says what is missing
and why.
"""

from __future__ import annotations

from collections.abc import Sequence

from llp.records import SearchResult
from llp.reporting.earlier_exhibit import with_earlier
from llp.reporting.evidence_sections import (
    flatness_section,
    scores_section,
    space_section,
    verification_section,
)
from llp.reporting.exhibits import Section
from llp.reporting.front_section import front_sections
from llp.reporting.probing_sections import (
    cost_exhibit,
    curves_section,
    ladder_section,
    ranks_section,
    trials_section,
)
from llp.reporting.proxy_exhibit import with_proxy
from llp.reporting.race_exhibit import with_race
from llp.reporting.rank_exhibit import with_ranks
from llp.reporting.tie_exhibit import with_ties

__all__ = ["cost_exhibit", "study_sections"]


def study_sections(result: SearchResult) -> Sequence[Section]:
    """All sections with figures and tables, in the order of the page."""
    return (
        with_ties(ladder_section(result), result),
        curves_section(result),
        with_proxy(with_ranks(ranks_section(result), result), result),
        with_earlier(space_section(result), result),
        flatness_section(result),
        scores_section(result),
        with_race(verification_section(result), result),
        *front_sections(result),
        trials_section(result),
    )
