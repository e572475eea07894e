"""The page of an evidence run: the sentence, the bars, all studies together, then each by itself.

Everything that was tried is on it, what failed too: every ranking, every metric with what is left
of it once tier 1 and the hyperparameters are known, every strategy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from llp.reporting import formats
from llp.reporting.documents import Document, Link
from llp.reporting.evidence_rows import (
    TARGETS,
    Evidence,
    MetricRow,
    Ranking,
    Strategy,
    StudyEvidence,
    TargetEvidence,
)
from llp.reporting.exhibits import Data, Exhibit, Section, drawn, share, signed, whole
from llp.reporting.figures.scores import ablation_figure
from llp.reporting.html import page
from llp.reporting.tables import Column, table, text

REGRET = (
    "Regret: points of test accuracy lost by taking the first (or the best of the first five) of a "
    "ranking instead of the best."
)
RANKING_NOTE = (
    "Rankings with h (hyperparameters) or T2 (tier 2) are predicted for configurations left out of "
    "the fit, so their weights cost the full trainings they were learnt from. Cost: probes, and "
    "metrics where used, as a share of training everything fully once. "
    + REGRET
    + " Noise ceiling: "
    "how well one seed's full trainings predict the mean of the other seeds. All configurations "
    "share their seeds, so networks of one shape share their initial weights; a ranking that knows "
    "the shape can come out above the ceiling."
)
METRIC_NOTE = (
    "Tau with the target; then what is left of it when both ranks have tier 1 (T1 and the training "
    "loss: networks that have not learnt are flat), or tier 1 and the hyperparameters, taken out; "
    "brackets are 90 % intervals. Noise: standard error over the spread between configurations; "
    "above 0.5 the score drops the metric. Cost: training examples a configuration, shared with "
    "the other metrics (the first that needs a gradient or a product pays) and alone."
)
STRATEGY_NOTE = (
    "Replayed on random three quarters of the configurations with one seed each, the same for all "
    "strategies. Worse by: regret minus that of the first line, with a 90 % interval over draws."
)


def evidence_html(evidence: Evidence, *, title: str = "", file: str = "") -> str:
    """The page as HTML text; the same evidence gives the same bytes."""
    links = [Link(s.name, s.page) for s in evidence.studies if s.page]
    return page(
        "document.html",
        title=formats.short(title or f"Evidence {evidence.name}", 200),
        extra_style="pages.css",
        kicker=f"evidence run {formats.short(evidence.name, 80)} · "
        f"{formats.plural(len(evidence.studies), 'study').replace('studys', 'studies')} · "
        f"{formats.short(file, 200)}",
        links=links,
        state=_state(evidence),
        document=_document(evidence),
    )


def _state(evidence: Evidence) -> str:
    if not evidence.missing:
        return ""
    parts = [f"{formats.clean(name)}: {formats.clean(why)}" for name, why in evidence.missing]
    return f"Not on this page: {'; '.join(parts)}."


def _document(evidence: Evidence) -> Document:
    sections = [_together(evidence)] if evidence.studies else []
    sections += [_study(study) for study in evidence.studies]
    kept = sum(bar.met is True for bar in evidence.bars)
    judged = sum(bar.met is not None for bar in evidence.bars)
    return Document(
        headline=formats.clean(evidence.sentence),
        sure=f"{kept} of {judged} bars are met; the table below says which." if judged else "",
        facts=tuple((study.name, study.about) for study in evidence.studies),
        sections=tuple(sections),
    )


def _together(evidence: Evidence) -> Section:
    exhibits = []
    frame = pd.DataFrame(
        [
            {**asdict(bar), "met": {True: "met", False: "missed", None: "not measured"}[bar.met]}
            for bar in evidence.bars
        ]
    )
    columns = (
        text("met", ""),
        text("name", "bar"),
        signed3("value", "measured"),
        signed3("bar", "asked for"),
        text("study", "study"),
    )
    exhibits.append(
        Exhibit(
            key="bars",
            title="What was promised",
            reading="The score is judged as it is in a new search: its weights come from the other "
            "studies, and no configuration of the study itself has been trained fully.",
            data=(Data("Bars", table(frame, columns), shown=True),),
            note="A negative margin means worse than what it is held against.",
        )
    )
    for target, rankings in evidence.rankings.items():
        verdict = evidence.verdicts[target]
        exhibits.append(
            _rankings(
                f"all-{target}",
                f"Mean over studies: {TARGETS[target]}",
                rankings,
                formats.clean(verdict.sentence),
                "Intervals: 90 %, Student's t over studies. Rankings are in the mean over the "
                "studies that have them. " + RANKING_NOTE,
                several=True,
            )
        )
        if len(evidence.studies) > 1:
            exhibits.append(
                _metrics(f"all-{target}-metrics", target, evidence.metrics[target], several=True)
            )
    return Section(
        "together",
        "All studies together",
        "Every configuration was probed, measured and then trained fully, whatever its probe said.",
        tuple(exhibits),
    )


def _rankings(
    key: str,
    title: str,
    rankings: Sequence[Ranking],
    reading: str,
    note: str,
    *,
    several: bool = False,
) -> Exhibit:
    frame = pd.DataFrame(
        [
            {
                "name": row.name,
                "tau": row.tau,
                "low": row.interval.low,
                "high": row.interval.high,
                "one": row.regret_at_1,
                "five": row.regret_at_5,
                "cost": row.cost,
                "learnt": row.learnt_from,
                "studies": row.num_studies,
            }
            for row in rankings
        ]
    )
    columns: tuple[Column, ...] = (
        text("name", "ranking by"),
        signed("tau", "Kendall tau"),
        signed("low", "from"),
        signed("high", "to"),
        points("one", "regret@1"),
        points("five", "regret@5"),
        share("cost", "cost"),
        whole("learnt", "learnt from"),
    )
    if several:
        columns += (whole("studies", "studies"),)
    return Exhibit(
        key=key,
        title=title,
        reading=reading,
        svgs=drawn(ablation_figure(frame)) if len(frame) else (),
        data=(Data("Rankings", table(frame, columns), shown=True),) if len(frame) else (),
        note=note,
        wide=True,
    )


def _study(study: StudyEvidence) -> Section:
    exhibits: list[Exhibit] = []
    for found in study.targets:
        exhibits.append(
            _rankings(
                f"{study.name}-{found.target}",
                f"Rankings: {TARGETS[found.target]}",
                found.rankings,
                _reading(found),
                RANKING_NOTE,
            )
        )
        exhibits.append(
            _metrics(f"{study.name}-{found.target}-metrics", found.target, found.metrics)
        )
    if study.strategies:
        exhibits.append(_strategies(study))
    failed = f", {study.num_diverged} without a result" if study.num_diverged else ""
    lead = (
        f"{formats.clean(study.about)}. {study.num_trials} configurations{failed}, "
        f"{formats.plural(study.num_seeds, 'full training')} of each. The probes cost "
        f"{formats.percent(study.probe_share)} of training everything fully once, tier 2 "
        f"{formats.percent(study.tier2_share)} of the probes"
        + (f" ({formats.clean(study.chosen)})." if study.chosen else ".")
        + (f" Not finished: {formats.clean(study.unfinished)}." if study.unfinished else "")
    )
    return Section(f"study-{study.name}", formats.short(study.name, 80), lead, tuple(exhibits))


def _reading(found: TargetEvidence) -> str:
    return formats.clean(found.verdict.sentence)


def _metrics(
    key: str, target: str, metrics: Sequence[MetricRow], *, several: bool = False
) -> Exhibit:
    frame = pd.DataFrame([_metric(row) for row in metrics])
    columns = (
        text("name", "metric"),
        signed("tau", "tau"),
        text("tau_interval", "90 %"),
        signed("t1", "given tier 1"),
        text("t1_interval", "90 %"),
        signed("h", "given tier 1 and h"),
        text("h_interval", "90 %"),
        signed("rate", "with log learning rate"),
        points("noise", "noise"),
        text("used", ""),
        whole("samples", "cost, shared"),
        whole("alone", "cost, alone"),
        whole("num", "n"),
    )
    return Exhibit(
        key=key,
        title=f"Tier-2 metrics{', mean over studies' * several}: {TARGETS[target]}",
        reading=_metrics_reading(metrics),
        data=(Data("Metrics", table(frame, columns), shown=True, sortable=True),)
        if len(frame)
        else (),
        note=("Here the intervals are Student's over studies. " * several + METRIC_NOTE)
        if len(frame)
        else "",
    )


def _metric(row: MetricRow) -> dict[str, object]:
    return {
        "name": row.name,
        "tau": row.tau,
        "tau_interval": _span(row.interval.low, row.interval.high),
        "t1": row.given_t1,
        "t1_interval": _span(row.given_t1_interval.low, row.given_t1_interval.high),
        "h": row.given_t1_h,
        "h_interval": _span(row.given_t1_h_interval.low, row.given_t1_h_interval.high),
        "rate": row.log_learning_rate,
        "noise": row.noise,
        "used": "dropped" if row.dropped else "used",
        "samples": row.samples,
        "alone": row.samples_alone,
        "num": row.num,
    }


def _metrics_reading(rows: Sequence[MetricRow]) -> str:
    if not rows:
        return "No tier-2 metric was measured."
    apart = [
        row.name
        for row in rows
        if row.given_t1_h_interval.low > 0 or row.given_t1_h_interval.high < 0
    ]
    first = (
        f"Given tier 1 and the hyperparameters, {formats.listed(apart)} still "
        f"{'says' if len(apart) == 1 else 'say'} something (90 % interval without 0)"
        if apart
        else "Given tier 1 and the hyperparameters no metric says anything that is clear of 0"
    )
    expected = round(0.1 * len(rows), 1)
    text_ = f"{first}; of {len(rows)} metrics about {expected:g} would by chance."
    dropped = [row.name for row in rows if row.dropped]
    if dropped:
        text_ += f" Too noisy to be used: {formats.listed(dropped)}."
    alone, shared = (
        sum(getattr(row, name) for row in rows) for name in ("samples_alone", "samples")
    )
    if math.isfinite(alone) and alone > 0:
        text_ += (
            f" Sharing gradients and products took {formats.percent(shared / alone, 0)} of the "
        )
        text_ += "cost of the metrics one by one."
    return text_


def _strategies(study: StudyEvidence) -> Exhibit:
    frame = pd.DataFrame([_strategy(row) for row in study.strategies])
    columns = (
        text("name", "strategy"),
        points("cost", "full trainings"),
        points("regret", "regret, points"),
        signed("worse", "worse by"),
        text("interval", "90 %"),
    )
    best = min(study.strategies, key=lambda row: row.regret)
    return Exhibit(
        key=f"{study.name}-strategies",
        title="Regret at equal compute",
        reading=f"Least regret: {formats.clean(best.name)}, {best.regret:.2f} points for "
        f"{best.cost:.1f} full trainings.",
        data=(Data("Strategies", table(frame, columns), shown=True),),
        note=STRATEGY_NOTE,
    )


def _strategy(row: Strategy) -> dict[str, object]:
    return {
        "name": row.name,
        "cost": row.cost,
        "regret": row.regret,
        "worse": row.worse_by,
        "interval": _span(row.interval.low, row.interval.high),
    }


def points(key: str, label: str) -> Column:
    """A column of numbers with two decimals."""
    return Column(key, label, lambda v: f"{v:.2f}" if formats.is_number(v) else formats.MISSING)


def signed3(key: str, label: str) -> Column:
    """A column of numbers with their sign and three decimals."""
    return Column(key, label, lambda value: formats.signed(value, 3))


def _span(low: float, high: float) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return "–"
    return f"[{formats.signed(low)}, {formats.signed(high)}]"
