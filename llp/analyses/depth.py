"""From first layer to last: ranks of features and weights, dead and dormant units, sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from llp import landscape
from llp.analyses.subject import Finding, Part, Subject, Work
from llp.landscape.plain import Plain
from llp.spec.landscape import LandscapeSpec


def depth(subject: Subject, spec: LandscapeSpec) -> Iterator[Part]:
    """`ranks` (of features), `weight_ranks`, `rank_dynamics`, `units` and `sizes`."""
    options = spec.ranks
    if options.features:
        yield Part("ranks", "ranks", {"spatial": options.spatial}, _features)
        yield Part(
            f"rank_dynamics/{options.measure}",
            "ranks",
            {"measure": options.measure},
            _dynamics,
            needs=("ranks",),
        )
    yield Part("weight_ranks", "ranks", {}, _weights)
    yield Part("units", "ranks", {"dormant_threshold": options.dormant_threshold}, _units)
    yield Part("sizes", "ranks", {}, _sizes)


def _features(work: Work) -> Finding:
    subject = work.subject
    found = landscape.feature_ranks(subject.model, subject.batches, spatial=work.spec.ranks.spatial)
    return by_layer(found)


def _weights(work: Work) -> Finding:
    return by_layer(landscape.weight_ranks(work.subject.model))


def _dynamics(work: Work) -> Finding:
    rows, measure = work.found["ranks"].rows, work.spec.ranks.measure
    if len(rows) < 2:
        return Finding(numbers={"note": "a network of one layer has no depth to follow"})
    first = rows[0]
    found = landscape.rank_dynamics(
        [float(row[measure] or 0.0) for row in rows],
        measure,
        reference=min(float(first["num_rows"] or 0), float(first["num_columns"] or 0)),
    )
    return Finding(numbers=found.summary(), arrays=found.to_arrays())


def _units(work: Work) -> Finding:
    subject = work.subject
    found = landscape.unit_activity(
        subject.model, subject.batches, threshold=work.spec.ranks.dormant_threshold
    )
    total = sum(each.num_units for each in found)
    numbers: dict[str, Any] = {"num_units": total}
    for kind in ("dead", "saturated", "dormant"):
        count = sum(getattr(each, f"num_{kind}") for each in found)
        numbers |= {f"num_{kind}": count, f"{kind}_ratio": count / total}
    layers = by_layer(found)
    return Finding(numbers=numbers, arrays=layers.arrays, rows=layers.rows)


def _sizes(work: Work) -> Finding:
    subject = work.subject
    return by_layer(landscape.layer_sizes(subject.model, subject.loss_fn, subject.batches))


def by_layer(records: Iterable[Plain]) -> Finding:
    """One row a record; its arrays under its name."""
    rows, arrays = [], {}
    for record in records:
        row = dict(record.summary())
        rows.append(row)
        arrays.update({f"{row['name']}/{key}": value for key, value in record.to_arrays().items()})
    return Finding(rows=rows, arrays=arrays)
