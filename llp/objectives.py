"""Several objectives of a search: error against cost, latency or size; `objectives` in the file.

`error` is 1 - validation accuracy, `seconds` the training time and `samples` the training examples
of a trial's probes, `parameters` the size of its network and `latency` the time of a forward pass
of one image. The front is taken where configurations can be compared: over all trials that ended
the rung that most of them ended, and over those that were trained fully.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from statistics import fmean

from llp.driver import Study
from llp.records import HyperparameterValue, ParetoFront, SearchResult
from llp.scoring.pareto import front_of
from llp.scoring.targets import judged
from llp.spec import Spec

SEARCHED = ("error", "seconds", "parameters")
"""Objectives that `tpe` and `gp` look for the front of. Samples are the same for all on a rung, and
a latency that is measured again would not be the same number when a search is resumed."""

Costs = Callable[[Mapping[str, HyperparameterValue]], Mapping[str, float]]


def record_fronts(spec: Spec, study: Study, costs: Costs) -> None:
    """Records the fronts of the study, if its spec asks for several objectives."""
    if not spec.objectives:
        return
    result = study.result()
    for front in fronts(spec, result, costs):
        study.record("front", front=front)


def fronts(spec: Spec, result: SearchResult, costs: Costs) -> list[ParetoFront]:
    """The front at the rung that most trials ended, and that of the full trainings."""
    names = spec.objectives
    found = []
    ended = Counter(curve.rung for t in result.trials for curve in t.curves if curve.points)
    epochs = {rung.rung: rung.epochs for rung in result.rungs}
    if ended:
        most = max(ended, key=lambda rung: (ended[rung], rung))
        values = {}
        for trial in result.trials:
            points = [p for c in trial.curves if c.rung == most for p in c.points]
            if not points or points[-1].epoch < epochs[most]:
                continue
            values[trial.trial.trial_id] = {
                "error": 1 - points[-1].validation_accuracy,
                "seconds": points[-1].seconds,
                "samples": float(points[-1].samples_seen),
                **costs(trial.trial.hyperparameters),
            }
        found.append(front_of(names, values, rung=most))
    runs: dict[str, list[tuple[float, float, float]]] = {}
    for v in judged(result.verifications, corrupted=spec.verification.corrupted):
        if math.isfinite(v.validation_accuracy):
            full = (1 - v.validation_accuracy, v.seconds, float(v.samples_seen))
            runs.setdefault(v.trial_id, []).append(full)
    if runs:
        by_id = {t.trial.trial_id: t.trial for t in result.trials}
        values = {
            name: {
                **dict(zip(("error", "seconds", "samples"), map(fmean, zip(*full, strict=True)))),  # noqa: B905
                **costs(by_id[name].hyperparameters),
            }
            for name, full in runs.items()
        }
        found.append(front_of(names, values, rung=0))
    return found
