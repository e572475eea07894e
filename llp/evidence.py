"""The main path of `llp study`: definition -> studies, run by the engine -> numbers -> one page.

The studies are ordinary study folders (`matrix.run` runs what is missing, a kill costs nothing that
finished); everything said about them is read from their ledgers. `write_page` needs no dataset, no
Ray and no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from llp import evidence_numbers as numbers
from llp.evidence_strategies import Trained, compare
from llp.matrix import OUT, Found, look
from llp.records import SearchResult
from llp.reporting.evidence_page import evidence_html
from llp.reporting.evidence_rows import (
    TARGETS,
    Bar,
    Evidence,
    Ranking,
    Strategy,
    StudyEvidence,
    TargetEvidence,
    Verdict,
)
from llp.reporting.html import write_page as write_html
from llp.reporting.runs import FullTraining, full_trainings
from llp.scoring import score, study_table
from llp.scoring.targets import judged
from llp.spec.matrix import Matrix
from llp.tracking.ledger import load_study, read_events, study_header

BAR_TAU = {"clean": 0.63, "corrupted": 0.55}
BAR_WORSE = 0.01
BAR_TIER2 = 0.2
VALIDATION = "validation_accuracy"


@dataclass(frozen=True)
class Run:
    """A study with its tables.

    Attributes:
        name: Of the study.
        result: What its ledger adds up to, with the full trainings of the seeds that count.
        trainings: Those full trainings.
        tables: Target -> `study_table`.
        page: Link to its own page; empty when there is none.
        unfinished: What is missing of it; empty when it is finished.
    """

    name: str
    result: SearchResult
    trainings: tuple[FullTraining, ...]
    tables: Mapping[str, pd.DataFrame]
    page: str
    unfinished: str = ""

    @property
    def full_samples(self) -> float:
        """Samples of one full training."""
        return fmean(v.samples_seen for v in self.result.verifications)


def write_page(matrix: Matrix, out: Path | None = None) -> tuple[Path, Evidence]:
    """Writes the page of an evidence run from the studies that are there.

    Args:
        matrix: Of `spec.evidence.load_evidence`.
        out: Folder; default `reports/out/NAME`.

    Raises:
        EnvironmentProblem: The file cannot be written.
    """
    folder = OUT / matrix.name if out is None else out
    found = gather(matrix, folder)
    html = evidence_html(found, title=matrix.title, file=Path(matrix.file).name)
    return write_html(html, folder / "evidence.html"), found


def gather(matrix: Matrix, out: Path) -> Evidence:
    """The evidence of the studies of a matrix; links are relative to `out`.

    A study that is not finished counts with the seeds that all its configurations have.
    """
    states = look(matrix)
    runs = [
        run
        for state in states.values()
        if state.status in ("finished", "running", "interrupted")
        and not state.changed
        and (run := _run(state, out)) is not None
    ]
    missing = tuple(
        (name, _why(state)) for name, state in states.items() if name not in [r.name for r in runs]
    )
    return evidence(matrix.name, runs, missing)


def _why(state: Found) -> str:
    if state.problem:
        return state.problem
    if state.changed:
        return f"run with another definition: {'; '.join(state.changed[:3])}"
    return {"missing": "not run yet"}.get(state.status, f"{state.status}, no seed is complete")


def _run(state: Found, out: Path) -> Run | None:
    """The study of a folder; None when not one seed has been trained for all configurations."""
    result = load_study(state.folder)
    trainings, unfinished = full_trainings(read_events(state.folder)), ""
    if state.status != "finished":
        configurations = {t.trial.trial_id for t in result.trials if t.outcome == "completed"}
        whole = whole_seeds(trainings, configurations)
        if not whole:
            return None
        wanted = result.spec["verification"]["num_seeds"]
        unfinished = f"{state.status}, with {len(whole)} of {wanted} seeds"
        trainings = tuple(each for each in trainings if each.seed in whole)
        kept = tuple(each for each in result.verifications if each.seed in whole)
        result = replace(result, verifications=kept)
    num_validation = int(study_header(state.folder)["num_validation"])
    corrupted = any(math.isfinite(v.corrupted_test_accuracy) for v in result.verifications)
    tables = {
        target: study_table(
            result.trials,
            result.profiles,
            judged(result.verifications, corrupted=target == "corrupted"),
            num_validation=num_validation,
            rungs=result.rungs,
        )
        for target in TARGETS
        if target == "clean" or corrupted
    }
    page = state.folder / "report.html"
    link = Path(os.path.relpath(page, out)).as_posix() if page.is_file() else ""
    return Run(state.name, result, trainings, tables, link, unfinished)


def whole_seeds(trainings: Sequence[FullTraining], trial_ids: Set[str]) -> frozenset[int]:
    """The seeds with which all of `trial_ids` were trained to some end."""
    ended: dict[int, set[str]] = {}
    for each in trainings:
        if each.end is not None:
            ended.setdefault(each.seed, set()).add(each.trial_id)
    return frozenset(seed for seed, found in ended.items() if found >= trial_ids)


def evidence(
    name: str, runs: Sequence[Run], missing: Sequence[tuple[str, str]] = (), *, seed: int = 0
) -> Evidence:
    """All numbers of the page."""
    studies = tuple(_study(run, [r for r in runs if r is not run], seed) for run in runs)
    by_target = {
        target: [each for study in studies for each in study.targets if each.target == target]
        for target in TARGETS
    }
    rankings = {t: numbers.over_studies(found) for t, found in by_target.items() if found}
    verdicts = {
        target: numbers.verdict([run.tables[target] for run in runs if target in run.tables])
        for target in rankings
    }
    bars = tuple(_bars(studies, by_target))
    return Evidence(
        name=name,
        studies=studies,
        missing=tuple(missing),
        rankings=rankings,
        metrics={t: numbers.metrics_over_studies(found) for t, found in by_target.items() if found},
        verdicts=verdicts,
        bars=bars,
        sentence=_sentence(studies, by_target, verdicts),
    )


def _study(run: Run, others: Sequence[Run], seed: int) -> StudyEvidence:
    result, num = run.result, len(run.result.trials)
    probe = result.cost.tier1 / num / run.full_samples
    metrics = result.cost.tier2 / num / run.full_samples
    targets = []
    for target, table in run.tables.items():
        found = numbers.target_evidence(
            target,
            table,
            result.profiles,
            judged(result.verifications, corrupted=target == "corrupted"),
            [other.tables[target] for other in others if target in other.tables],
            probe_share=probe,
            metrics_share=metrics,
            seed=seed,
        )
        targets.append(found)
    clean = numbers.judge(run.tables["clean"])
    seeds = {v.seed for v in result.verifications}
    return StudyEvidence(
        name=run.name,
        about=_about(result),
        num_trials=num,
        num_diverged=int(np.isnan(clean).sum()),
        num_seeds=len(seeds),
        probe_share=probe,
        tier2_share=result.cost.tier2 / result.cost.tier1 if result.cost.tier1 else math.nan,
        chosen=next((p.note for p in result.profiles if p.note), ""),
        targets=tuple(targets),
        strategies=_strategies(run, others, probe, metrics, seed),
        page=run.page,
        unfinished=run.unfinished,
    )


def _about(result: SearchResult) -> str:
    spec: Mapping[str, Any] = result.spec
    data, rung = spec["dataset"], result.rungs[-1]
    parts = [data["name"], spec["model"]["name"], spec["training"]["optimizer"]]
    parts.append(f"{spec['training']['schedule']} schedule")
    if data.get("label_noise"):
        parts.append(f"{100 * data['label_noise']:g} % wrong labels")
    if data.get("max_train_examples"):
        parts.append(f"{data['max_train_examples']:,} training images")
    parts.append(f"probe: {rung.num_examples:,} images, {rung.epochs} epochs")
    return ", ".join(parts)


def _strategies(
    run: Run, others: Sequence[Run], probe: float, metrics: float, seed: int
) -> tuple[Strategy, ...]:
    table = run.tables["clean"]
    names = list(table.index)
    truth = numbers.judge(table)
    if not np.isfinite(truth).any():
        return ()
    truth = np.where(np.isnan(truth), np.nanmin(truth), truth)
    scores = {"T1": _t1_scores(table, seed)}
    with_metrics = frozenset({"T1, hyperparameters and tier 2 learnt elsewhere"})
    if others:
        for name in with_metrics:
            tables = [other.tables["clean"] for other in others]
            scores[name] = numbers.transferred_scores(table, tables, seed=seed)
    return compare(
        Trained(_curves(run, names), truth, scores, probe, metrics, with_metrics), seed=seed
    )


def _t1_scores(table: pd.DataFrame, seed: int) -> Any:
    weights = {VALIDATION: 0.4, "validation_loss": 0.4, "validation_accuracy_last3": 0.2}
    found = score(table, preset="weights", weights=weights, seed=seed).table["score"]
    return found.reindex(table.index).to_numpy(dtype=np.float64)


def _curves(run: Run, names: Sequence[str]) -> Any:
    """Validation accuracy `[n, seeds, epochs]` of the full trainings."""
    seeds = sorted({training.seed for training in run.trainings})
    epochs = max(p.epoch for training in run.trainings for p in training.points)
    curves = np.full((len(names), len(seeds), epochs), np.nan)
    for training in run.trainings:
        for point in training.points:
            place = names.index(training.trial_id), seeds.index(training.seed), point.epoch - 1
            curves[place] = point.validation_accuracy
    return curves


def _bars(
    studies: Sequence[StudyEvidence], by_target: Mapping[str, Sequence[TargetEvidence]]
) -> list[Bar]:
    bars = []
    for target, found in by_target.items():
        taus = [_tau(each.rankings, numbers.TRANSFERRED) for each in found]
        taus = [value for value in taus if math.isfinite(value)]
        mean = fmean(taus) if taus else math.nan
        bars.append(
            _bar(f"tau of the score, {TARGETS[target]}, mean over studies", mean, BAR_TAU[target])
        )
    gains = {
        f"{study.name}, {each.target}": _tau(each.rankings, numbers.TRANSFERRED)
        - _tau(each.rankings, VALIDATION)
        for study in studies
        for each in study.targets
    }
    worst = min(gains, key=lambda name: _or_infinity(gains[name]), default="")
    low = gains.get(worst, math.nan)
    bars.append(_bar("score minus validation accuracy alone, worst study", low, -BAR_WORSE, worst))
    for word, name in (
        ("successive halving, equal compute", "successive halving"),
        ("epochs for everyone, then verify, equal compute", "short trainings at equal compute"),
    ):
        margins = [
            each.worse_by for s in studies for each in s.strategies if each.name.endswith(word)
        ]
        mean = fmean(margins) if margins else math.nan
        bars.append(_bar(f"points of regret less than {name}, mean", mean, 0.0))
    shares = {study.name: study.tier2_share for study in studies}
    costliest = max(shares, key=lambda name: -_or_infinity(-shares[name]), default="")
    most = shares.get(costliest, math.nan)
    met = most <= BAR_TIER2 * 1.02 if math.isfinite(most) else None
    bars.append(Bar("cost of tier 2 over its probe, largest", most, BAR_TIER2, met, costliest))
    return bars


def _bar(name: str, value: float, bar: float, study: str = "") -> Bar:
    known = math.isfinite(value)
    return Bar(name, value, bar, value >= bar if known else None, study if known else "")


def _or_infinity(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _tau(rankings: Sequence[Ranking], name: str) -> float:
    return next((row.tau for row in rankings if row.name == name), math.nan)


def _sentence(
    studies: Sequence[StudyEvidence],
    by_target: Mapping[str, Sequence[TargetEvidence]],
    verdicts: Mapping[str, Verdict],
) -> str:
    """Whether flatness helped, from the numbers."""
    if not studies:
        return "No study is finished yet, so nothing can be said."
    total = sum(study.num_trials for study in studies)
    head = f"{len(studies)} stud{'y' if len(studies) == 1 else 'ies'}, {total} configurations"
    partial = [f"{study.name} {study.unfinished}" for study in studies if study.unfinished]
    head += f" (not finished: {'; '.join(partial)})" if partial else ""
    return f"{head}. " + " ".join(
        _target_sentence(target, by_target[target], verdict) for target, verdict in verdicts.items()
    )


def _target_sentence(target: str, found: Sequence[TargetEvidence], verdict: Verdict) -> str:
    # Means are compared over the same studies: those in which tier 2 could be weighed.
    whole = [each for each in found if math.isfinite(_tau(each.rankings, "T1+h+T2"))] or found
    taus = {
        name: fmean(values)
        for name in (VALIDATION, "T1", "T1+h", "T1+h+T2")
        if all(map(math.isfinite, values := [_tau(each.rankings, name) for each in whole]))
    }
    numbers_ = "tau: " + ", ".join(f"{name} {value:.2f}" for name, value in taus.items())
    if len(whole) < len(found):
        numbers_ += f"; of the {len(whole)} in which tier 2 could be weighed"
    if not math.isfinite(verdict.gain):
        return f"On {TARGETS[target]} tier 2 could not be judged ({numbers_})."
    low, high = verdict.interval.low, verdict.interval.high
    gain = f"{verdict.gain:+.3f} in tau, 90 % interval [{low:+.3f}, {high:+.3f}]"
    gain += f", shuffled {verdict.shuffled:+.3f}"
    if verdict.enters:
        word = "Yes, flatness helped to rank by"
    elif high <= 0.02:
        word = "No, flatness did not help to rank by"
    else:
        word = "It has not been shown that flatness helps to rank by"
    return f"{word} {TARGETS[target]}: {gain} ({numbers_})."
