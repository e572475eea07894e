"""Checks that need the tables: names, options, rungs, resources; `space` has the search space.

Nothing of our own is imported for them: names and options of our rows are in `registry`, so a bad
file fails before torch or Ray is loaded. Only `my_package:thing` is imported, to see that it is
there and what options it takes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llp import registry
from llp.errors import Problem, SpecError, unknown
from llp.spec import options, secrets, space
from llp.spec.schema import Locator, Spec
from llp.spec.source import Source, as_parts

_SEPARATE = {
    "name",
    "seed",
    "dataset",
    "searcher",
    "tier1",
    "tier2",
    "score",
    "verification",
    "resources",
    "tracking",
    "output",
    "objectives",
}
"""Sections that can be damaged without making the search space unjudgeable."""

Finding = tuple[str, str]
"""Dotted path and message."""


def check(spec: Spec) -> None:
    """Raises everything that is wrong with the names, options and search space of `spec`.

    Raises:
        SpecError: All problems, with file and line when `spec` was loaded from a file.
    """
    found = problems(spec, spec._source or Source())
    if found:
        raise SpecError(found)


def problems(
    spec: Spec, places: Locator, *, damaged: Iterable[str] = (), stored: bool = False
) -> list[Problem]:
    """What is wrong with `spec` beyond its shape.

    Args:
        spec: The spec; sections in `damaged` were cut down to what is valid of them.
        places: Where its keys were written.
        damaged: Top-level keys with problems of shape, whose other checks would mislead.
        stored: A study began with it, under an older version perhaps; what was legal then still is.
    """
    damaged = set(damaged)
    found = [*_names(spec), *secrets.findings(spec.model_dump(mode="json"))]
    if "tier1" not in damaged:
        found += _rungs(spec)
        if "tier2" not in damaged:
            found += _tie_break(spec)
    if "resources" not in damaged:
        found += _resources(spec)
    if spec.searcher.name == "grid":
        if spec.searcher.warm_start is not None:
            found.append(("searcher.warm_start", "a grid tries all its points whatever was before"))
        for name, domain in spec.search_space.items():
            if domain.prior is not None:
                found.append((f"search_space.{name}.prior", "a grid has no use for a prior"))
    warm = spec.searcher.warm_start
    asks = warm is not None and "searcher" not in damaged
    if warm is not None and asks and not warm.studies and warm.meta is None:
        text = "needs `studies`, a list of earlier ones, or `meta: {collection: FOLDER}`"
        found.append(("searcher.warm_start", text))
    if warm is not None and asks and warm.meta is not None and "tier1" not in damaged:
        count, num_trials = warm.meta.count, spec.tier1.num_trials
        if count > num_trials and not stored:
            text = f"{count} configurations to try first are more than tier1.num_trials"
            found.append(("searcher.warm_start.meta.count", f"{text} ({num_trials})"))
    if spec.searcher.proxy is not None:
        found += _named("proxies", spec.searcher.proxy.name, "searcher.proxy.name")
        if spec.searcher.name != "random":
            text = f"a proxy filters random draws; with searcher '{spec.searcher.name}' drop it"
            found.append(("searcher.proxy", text))
    if damaged <= _SEPARATE:
        found += space.findings(spec)
        if not found and spec.searcher.name == "grid" and "tier1" not in damaged:
            found += space.grid_findings(spec)
    return [places.problem(as_parts(path), message) for path, message in found]


def check_ladder(
    spec: Spec,
    num_train: int,
    num_classes: int,
    counts: Sequence[Iterable[int]] | None = None,
) -> None:
    """Makes sure that every rung holds at least one image of each class.

    Args:
        spec: The spec.
        num_train: Training images, validation excluded.
        num_classes: Number of classes.
        counts: Images of each class in the subset of each rung, lowest first, `num_classes` to a
            rung; without them only the size of the lowest rung is looked at.

    Raises:
        SpecError: At `tier1.data_fractions`, with the numbers and the smallest fraction.
    """
    fraction = spec.tier1.data_fractions[0]
    if round(fraction * num_train) >= num_classes:
        _check_counts(spec, num_train, [[int(n) for n in rung] for rung in counts or ()])
        return
    least = -(-10_000 * num_classes // num_train) / 10_000
    message = (
        f"a fraction of {fraction:g} is {round(fraction * num_train)} of {num_train:,} training "
        f"images, fewer than one for each of {num_classes} classes; "
    )
    message += f"use {least:g} or more" if least <= 1 else "the dataset itself is too small"
    raise SpecError([spec.problem("tier1.data_fractions.0", message)])


def _check_counts(spec: Spec, num_train: int, counts: Sequence[Sequence[int]]) -> None:
    """Refuses rungs without an image of some class, as happens to rare classes."""
    found = []
    for k, (fraction, rung) in enumerate(zip(spec.tier1.data_fractions, counts, strict=False)):
        if min(rung) > 0:
            continue
        highest = counts[-1]
        missing = min((c for c, n in enumerate(rung) if n == 0), key=lambda c: highest[c])
        whole, total = highest[missing], sum(highest)
        # n images in proportion to the classes hold one of each where n times every share is 1.
        least = math.ceil(10_000 * total / (whole * num_train)) / 10_000 if whole else math.inf
        message = (
            f"a fraction of {fraction:g} is {sum(rung):,} of {num_train:,} training images and "
            f"none of class {missing}, of which the highest rung has {whole}; "
        )
        message += f"use {least:g} or more" if least <= 1 else "the data need more of that class"
        found.append(spec.problem(f"tier1.data_fractions.{k}", message))
    if found:
        raise SpecError(found)


def _names(spec: Spec) -> Iterator[Finding]:
    training, tier1, tier2 = spec.training, spec.tier1, spec.tier2
    yield from _named("datasets", spec.dataset.name, "dataset.name")
    yield from options.faults(
        "datasets", [spec.dataset.name], spec.dataset.options, "dataset.options"
    )
    if spec.dataset.name == "image_folder" and spec.dataset.root is None:
        yield "dataset.root", "missing key 'root': image_folder needs the folder of the images"
    yield from _named("models", spec.model.name, "model.name")
    yield from options.faults("models", space.models(spec), spec.model.options, "model.options")
    yield from _named("optimizers", training.optimizer, "training.optimizer")
    yield from options.faults(
        "optimizers",
        [training.optimizer, *space.optimizers(spec)],
        training.optimizer_options,
        "training.optimizer_options",
    )
    yield from _named("averagings", training.averaging, "training.averaging")
    yield from options.faults(
        "averagings",
        [training.averaging, *space.averagings(spec)],
        training.averaging_options,
        "training.averaging_options",
    )
    yield from _named("schedules", training.schedule, "training.schedule")
    for k, name in enumerate(training.augmentation):
        yield from _named("augmentations", name, f"training.augmentation.{k}")
    for k, row in enumerate(training.callbacks):
        yield from _row("callbacks", row, f"training.callbacks.{k}")
        if row.get("name") in [other.get("name") for other in training.callbacks[:k]]:
            yield f"training.callbacks.{k}", f"'{row.get('name')}' is listed twice"
    yield from _named("schedulers", tier1.scheduler, "tier1.scheduler")
    yield from options.faults(
        "schedulers", [tier1.scheduler], tier1.scheduler_options, "tier1.scheduler_options"
    )
    yield from _named("searchers", spec.searcher.name, "searcher.name")
    for k, rule in enumerate(tier1.stop_rules):
        yield from _row("stop_rules", rule, f"tier1.stop_rules.{k}")
    for k, rule in enumerate(tier1.search_rules):
        yield from _row("search_rules", rule, f"tier1.search_rules.{k}")
    refinements = [n for n, row in registry.METRICS.items() if ".refinements:" in row.target]
    for k, name in enumerate(tier2.metrics):
        if name in refinements:
            yield f"tier2.metrics.{k}", f"'{name}' belongs to tier2.refinements"
        else:
            yield from _named("metrics", name, f"tier2.metrics.{k}", without=refinements)
        if name in tier2.metrics[:k]:
            yield f"tier2.metrics.{k}", f"'{name}' is listed twice"
    for k, name in enumerate(tier2.refinements):
        if name not in refinements and ":" not in name:
            yield f"tier2.refinements.{k}", unknown("refinement", name, refinements)


def _tie_break(spec: Spec) -> Iterator[Finding]:
    tier1, tier2 = spec.tier1, spec.tier2
    if tier2.tie_break == "off":
        if tier2.calibration is not None:
            yield "tier2.calibration", "is read only with tier2.tie_break: earned"
        return
    if tier1.scheduler not in ("asha", "hyperband"):
        text = f"scheduler '{tier1.scheduler}' has no cut to tie at; use asha or hyperband"
        yield "tier2.tie_break", f"{text}, or tie_break: off"
    if tier1.eager_promotion:
        text = "promotions on incomplete rungs have no cut to tie at; drop tier1.eager_promotion"
        yield "tier2.tie_break", f"{text}, or use tie_break: off"
    if tier2.top_k == 0:
        yield "tier2.tie_break", "tier2.top_k: 0 turns tier 2 off; use 1 or more"


def _named(table: str, name: str, path: str, *, without: Iterable[str] = ()) -> Iterator[Finding]:
    """What is wrong with `name` as a row of `table`, or as `module:attribute`."""
    fault = options.unusable(table, name, without=without)
    if fault:
        yield path, fault


def _row(table: str, rule: Mapping[str, Any], path: str) -> Iterator[Finding]:
    """What is wrong with a row that is given with its options, `{name: ..., ...}`."""
    if "name" not in rule:
        yield path, f"missing key 'name': a row of `llp list {table}`"
        return
    if not isinstance(rule["name"], str):
        yield f"{path}.name", f"must be text, not {rule['name']!r}"
        return
    yield from _named(table, rule["name"], f"{path}.name")
    given = {key: value for key, value in rule.items() if key != "name"}
    yield from options.faults(table, [rule["name"]], given, path)


def _rungs(spec: Spec) -> Iterator[Finding]:
    costs = [
        (fraction * epochs, fraction, epochs)
        for fraction, epochs in zip(spec.tier1.data_fractions, spec.rung_epochs(), strict=True)
    ]
    for k, (below, above) in enumerate(itertools.pairwise(costs), start=1):
        if above[0] <= below[0] * (1 + 1e-9):
            yield (
                f"tier1.data_fractions.{k}",
                f"rung {k + 1} ({above[1]:g} of the images, {above[2]} epochs) costs no more than "
                f"rung {k} ({below[1]:g}, {below[2]} epochs); each rung needs more",
            )
    if (
        spec.tier1.warmup_fraction
        and spec.training.schedule == "one_cycle"
        and "schedule" not in spec.search_space
    ):
        yield "tier1.warmup_fraction", "nothing reads it: schedule one_cycle has a rise of its own"


def _resources(spec: Spec) -> Iterator[Finding]:
    resources = spec.resources
    for kind, total, share in (
        ("cpus", resources.num_cpus, resources.cpus_per_trial),
        ("gpus", resources.num_gpus, resources.gpus_per_trial),
    ):
        if total is not None and share > total:
            yield (
                f"resources.{kind}_per_trial",
                f"{kind}_per_trial ({share:g}) is over num_{kind} ({total})",
            )
    if resources.gpus_per_trial > 1 and not float(resources.gpus_per_trial).is_integer():
        yield (
            "resources.gpus_per_trial",
            f"{resources.gpus_per_trial:g} GPUs: use a fraction below 1 or a whole number",
        )
