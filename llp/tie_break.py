"""Whether tier 2 may settle ties at promotions: decided once, when tier 1 begins, and recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llp.driver import Study
from llp.errors import SpecError
from llp.flatness.budget import plan_measurement
from llp.flatness.metrics import measured_names
from llp.records import Rung, TieBreak, from_plain
from llp.scoring.tie_break import earned, read_calibration
from llp.spec import Spec


def recorded_tie_break(spec: Spec, study: Study) -> TieBreak | None:
    """What ties are settled by: as the ledger has it, decided and recorded the first time."""
    for event in study.history:
        if event["event"] == "tie_break":
            return from_plain(TieBreak, event["tie_break"])
    found = make_tie_break(spec)
    if found is not None:
        study.record("tie_break", tie_break=found)
    return found


def make_tie_break(spec: Spec) -> TieBreak | None:
    """Whether tier 2 has earned to break ties, by the calibration that the spec names.

    Raises:
        SpecError: The file cannot be read, or is no calibration.
    """
    if spec.tier2.tie_break == "off":
        return None
    found = None
    if spec.tier2.calibration is not None:
        path = Path(spec.tier2.calibration)
        try:
            found = read_calibration(path.read_bytes())
        except (OSError, ValueError) as error:
            why = f": {error.strerror or error}" if isinstance(error, OSError) else f" {error}"
            raise SpecError([spec.problem("tier2.calibration", f"'{path}'{why}")]) from error
    return earned(found, {row: measured_names(row, spec.tier2) for row in spec.tier2.metrics})


def left_out_of_ties(
    spec: Spec, found: TieBreak | None, rungs: Sequence[Rung]
) -> dict[int, tuple[str, ...]]:
    """Rung -> metrics of the tie-break that do not fit into `tier2.budget` after a probe on it.

    Without the highest of `rungs`, from which nothing is promoted, and those on which all fit.
    """
    if found is None or not found.used:
        return {}
    update = {"metrics": list(found.metrics), "refinements": []}
    options = spec.tier2.model_copy(update=update)
    planned = {rung.rung: plan_measurement(options, rung).left_out for rung in rungs[:-1]}
    return {rung: names for rung, names in planned.items() if names}
