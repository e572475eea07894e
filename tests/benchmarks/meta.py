"""Meta-learned warm start, judged on data sets that it has not seen.

Each task is left out in turn. The others are finished studies: `--past` random configurations each,
trained fully. Five configurations are proposed for the task that was left out and looked up in its
table; the search goes on with random ones. Sets of methods:

- `none`: five at random;
- `recent`: the five best of a single other task, drawn at random;
- `named`: the best of five other tasks, drawn at random, as `searcher.warm_start.studies` gives;
- `nearest`: the best of the five tasks with the nearest features;
- `meta`: the portfolio of `searcher.warm_start.meta` (`llp.probing.meta_learning`);
- `weighted`: the same, with studies weighted by features of dataset and model
  (`meta_features.py`); not in the product, because it is no better.

Regret is the error above the best of the table, by that of its median configuration (TaskSet: of
its median first loss). Families: *TaskSet* (six text tasks, eight hyperparameters of Adam),
*images* (the MLP with six hyperparameters on `meta_tasks.py`: digits and parts of it spoilt in
ways, tabular, synthetic, CIFAR where it is there), *strangers* (the same; all tasks of the same
origin are left out together) and *mixed* (trainings of a deep MLP among them). Intervals are 95 %,
of the mean over tasks of paired differences; tasks of one origin are alike, so they are a little
narrow. About a dozen rules of proposing (portfolio on scores or log ranks, mean score, bandwidths
of the weights, studies in turn) were compared on these same tasks before one was kept, so the gain
over `named` is somewhat optimistic.

    python tests/benchmarks/meta.py [--quick] [--table FILE] [--json FILE]

`--table` keeps the trainings of the images (a quarter of an hour of one core) in a parquet file.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import Bar, finish, machine, parser, print_table
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr, t

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from meta_features import dataset_features, similarity, study_features

from llp.probing.meta_learning import normal_scores, portfolio, surrogate_mean

Floats = NDArray[np.float64]
CURVES = Path(__file__).resolve().parents[3] / "shared" / "curves" / "taskset_dev.npz"
COUNT = 5
LENGTH = 40
"""Trials of a search."""
CAP = 2.0
METHODS = ("none", "recent", "named", "nearest", "meta", "weighted")
QUICK = ("digits_100", "digits_300", "wine", "breast_cancer", "digits_below_5", "digits_parity")


@dataclass(frozen=True)
class Family:
    """Tasks that share a table of configurations.

    Attributes:
        tasks: Names.
        origins: Tasks of the same origin are left out together.
        unit: [num_configurations, num_coordinates], in the unit cube.
        regret: [num_tasks, num_configurations].
        features: [num_tasks, num_features].
        judged: [num_tasks], which are left out in turn.
    """

    tasks: list[str]
    origins: list[str]
    unit: Floats
    regret: Floats
    features: Floats
    judged: NDArray[np.bool_]


def taskset() -> Family:
    """The TaskSet tables; the features are what the names of the tasks say about the networks."""
    archive = np.load(CURVES, allow_pickle=False)
    names = [str(name) for name in archive["task_names"]]
    columns = []
    for name, values in zip(archive["hp_names"], archive["hp_0"].T.astype(np.float64), strict=True):
        scaled = np.log10(1 - np.minimum(values, 1 - 1e-7)) if "beta" in name else np.log10(values)
        columns.append((scaled - scaled.min()) / np.ptp(scaled))
    regret, features = [], []
    for index, name in enumerate(names):
        losses = archive[f"valid_{index}"].astype(np.float64)
        best, start = np.nanmin(losses[:, -1]), np.nanmedian(losses[:, 0])
        found = np.clip((losses[:, -1] - best) / (start - best), 0, 1)
        regret.append(np.where(np.isnan(found), 1.0, found))
        kinds = [float(kind in name) for kind in ("LSTM", "GRU", "IRNN", "VRNN", "patch128", "avg")]
        features.append([*kinds, np.log2(float(name.rsplit("bs", 1)[1]))])
    everywhere = np.ones(len(names), dtype=bool)
    return Family(
        names, names, np.stack(columns, axis=1), np.stack(regret), np.array(features), everywhere
    )


def images(table: Any, *, deep: bool, strangers: bool) -> Family:
    """The trainings of `meta_tasks`."""
    import meta_tasks

    from llp.meta_start import encode
    from llp.workloads.datasets import load

    names = [n for n in dict.fromkeys(table["task"]) if deep or not n.endswith(meta_tasks.DEEP)]
    known, rows = [], []
    for name in names:
        spec = meta_tasks.experiment(name)
        known.append(
            study_features(
                spec.model_dump(mode="json"),
                dataset_features(load(spec.dataset, meta_tasks.SEED).without_test()),
            )
        )
        own = table[table["task"] == name].sort_values("number")
        error = own["error"].fillna(1.0).to_numpy()
        best, middle = error.min(), float(np.median(error))
        ties = 1e-6 * rankdata(own["loss"].fillna(np.inf)) / len(own)
        rows.append(np.minimum((error - best) / max(middle - best, 1e-3), CAP) + ties)
    parts = sorted({part for each in known for part in each})
    space = meta_tasks.experiment("digits").search_space
    plain = [name.removesuffix(meta_tasks.DEEP) for name in names]
    origins = [_origin(name) for name in plain] if strangers else plain
    return Family(
        names,
        origins,
        encode(space, meta_tasks.configurations(len(rows[0]))),
        np.stack(rows),
        np.array([[each.get(part, 0.0) for part in parts] for each in known]),
        np.ones(len(names), dtype=bool),
    )


def _origin(name: str) -> str:
    return next((o for o in ("digits", "synthetic", "cifar") if name.startswith(o)), name)


@dataclass(frozen=True)
class Past:
    """One draw of what the earlier studies tried.

    Attributes:
        best: [num_tasks] rows of the table that each tried, best first.
        expected: [num_tasks, num_configurations], the surrogates.
    """

    best: list[NDArray[np.int64]]
    expected: Floats


def draw_past(family: Family, past: int, seed: int) -> Past:
    """What every task's study tried, and what it makes of the rest."""
    rng = np.random.default_rng([seed, past])
    best, expected = [], []
    for regret in family.regret:
        rows = rng.choice(len(family.unit), min(past, len(family.unit)), replace=False)
        best.append(rows[np.argsort(regret[rows], kind="stable")])
        scores = normal_scores(-regret[rows])
        expected.append(surrogate_mean(family.unit[rows], scores, family.unit))
    return Past(best, np.stack(expected))


def first_five(
    family: Family, task: int, tried: Past, rng: np.random.Generator
) -> dict[str, NDArray[np.int64]]:
    """Method -> rows of the table to try first."""
    others = [s for s in range(len(family.tasks)) if family.origins[s] != family.origins[task]]
    pool = np.unique(np.concatenate([tried.best[s] for s in others]))
    expected = tried.expected[np.ix_(others, pool)]
    weights = similarity(family.features[others], family.features[task])
    near = [others[k] for k in np.argsort(-weights, kind="stable")]
    drawn = [int(s) for s in rng.permutation(others)]
    even = np.full(len(others), 1 / len(others))
    return {
        "none": rng.choice(len(family.unit), COUNT, replace=False),
        "recent": tried.best[drawn[0]][:COUNT],
        "named": _in_turn(tried.best, drawn),
        "nearest": _in_turn(tried.best, near),
        "meta": pool[portfolio(expected, even, COUNT)],
        "weighted": pool[portfolio(expected, weights, COUNT)],
    }


def _in_turn(best: Sequence[NDArray[np.int64]], order: Sequence[int]) -> NDArray[np.int64]:
    """The best of each study, then the second best of each, without repeats, five in all."""
    found: list[int] = []
    for place in range(COUNT):
        for study in order:
            row = int(best[study][place])
            if row not in found and len(found) < COUNT:
                found.append(row)
    return np.array(found)


def judge(family: Family, past: int, searches: int) -> dict[str, Floats]:
    """Method -> regret [num_judged_tasks, LENGTH] of the best so far, mean over searches."""
    found: dict[str, list[Floats]] = {method: [] for method in METHODS}
    tried = [draw_past(family, past, seed) for seed in range(searches)]
    for task in np.flatnonzero(family.judged):
        curves: dict[str, list[Floats]] = {method: [] for method in METHODS}
        for seed in range(searches):
            rng = np.random.default_rng([seed, int(task)])
            proposed = first_five(family, int(task), tried[seed], rng)
            rest = rng.permutation(len(family.unit))
            for method, rows in proposed.items():
                after = [row for row in rest if row not in rows]
                order = np.array([*rows, *after])[:LENGTH]
                curves[method].append(np.minimum.accumulate(family.regret[task][order]))
        for method in METHODS:
            found[method].append(np.mean(curves[method], axis=0))
    return {method: np.stack(curves) for method, curves in found.items()}


def with_scheduler(family: Family, past: int, searches: int) -> dict[str, Floats]:
    """Method -> regret [num_tasks, num_budgets] of ASHA with warm checkpoints on TaskSet."""
    from llp.simulation.clock import run
    from llp.simulation.study import Options, contender
    from llp.simulation.tasks import read_tasks

    options = Options(budget=10.0, seeds=searches)
    budgets = np.array([2.0, 5.0, 10.0])
    found: dict[str, list[Floats]] = {method: [] for method in METHODS}
    tasks = {task.name: task for task in read_tasks([CURVES])}
    tried = [draw_past(family, past, seed) for seed in range(searches)]
    for index, name in enumerate(family.tasks):
        own: dict[str, list[Floats]] = {method: [] for method in METHODS}
        for seed in range(searches):
            rng = np.random.default_rng([seed, index])
            proposed = first_five(family, index, tried[seed], rng)
            rest = rng.permutation(len(family.unit))
            for method, rows in proposed.items():
                order = [*map(int, rows), *(int(row) for row in rest if row not in rows)]
                task = tasks[name]
                trace = run(
                    task,
                    contender(task, "asha", order[: options.trials], seed, options),
                    budget=options.budget,
                )
                own[method].append(trace.regret(task, budgets))
        for method in METHODS:
            found[method].append(np.mean(own[method], axis=0))
    return {method: np.stack(curves) for method, curves in found.items()}


def interval(differences: Floats) -> tuple[float, float, float]:
    """Mean and 95 % interval over tasks."""
    mean, size = float(differences.mean()), len(differences)
    half = float(t.ppf(0.975, size - 1) * differences.std(ddof=1) / np.sqrt(size))
    return mean, mean - half, mean + half


def alikeness(family: Family) -> float:
    """Spearman of the distance of two tasks' features and the rank correlation of their regrets."""
    together = np.corrcoef(rankdata(family.regret, axis=1))
    pairs = np.triu_indices(len(family.tasks), 1)
    spread = family.features.std(axis=0)
    scaled = family.features[:, spread > 1e-9] / spread[spread > 1e-9]
    distance = np.sqrt(((scaled[:, None] - scaled[None]) ** 2).sum(axis=-1))
    return float(spearmanr(distance[pairs], together[pairs]).statistic)


def trainings(until: int, reference: Floats, curve: Floats) -> float:
    """Full trainings until `curve` is as good as `reference` is after `until`; inf for never."""
    reached = np.flatnonzero(curve <= reference[until - 1] + 1e-12)
    return float(reached[0] + 1) if len(reached) else float("inf")


def image_table(file: Path | None, quick: bool) -> Any:
    """The trainings of the images, from `file` when they are there."""
    import meta_tasks
    import pandas as pd

    if file is not None and file.exists():
        return pd.read_parquet(file)
    whole = list(meta_tasks.tasks())
    names = [*(QUICK if quick else whole), *(n + meta_tasks.DEEP for n in meta_tasks.DEEP_TASKS)]
    names = [n for n in names if not quick or n.removesuffix(meta_tasks.DEEP) in QUICK[:4]]
    names = [n for n in names if n.removesuffix(meta_tasks.DEEP) in whole]
    number = LENGTH + 5 if quick else meta_tasks.NUM_CONFIGURATIONS
    parts = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="llp-meta-") as folder:
            parts.append(meta_tasks.train_table(name, number, Path(folder)))
    table = pd.concat(parts, ignore_index=True)
    if file is not None:
        table.to_parquet(file)
    return table


def show(name: str, past: int, curves: dict[str, Floats]) -> dict[str, Any]:
    """Prints a family and returns its figures."""
    rows, figures = [], {}
    reference = curves["none"].mean(axis=0)
    for method in METHODS:
        against = curves["none"][:, COUNT - 1] - curves[method][:, COUNT - 1]
        ahead = interval(curves["recent"][:, COUNT - 1] - curves[method][:, COUNT - 1])
        beside = interval(curves["named"][:, COUNT - 1] - curves[method][:, COUNT - 1])
        mean = curves[method].mean(axis=0)
        figures[method] = {
            "first_five": float(mean[COUNT - 1]),
            "after_10_20_40": [float(mean[k - 1]) for k in (10, 20, 40)],
            "gain_over_none": interval(against),
            "gain_over_recent": ahead,
            "gain_over_named": beside,
            "to_match_20_random": trainings(20, reference, mean),
            "tasks_better_than_named": int((curves[method] < curves["named"])[:, COUNT - 1].sum()),
        }
        rows.append(
            [
                method,
                f"{mean[COUNT - 1]:.3f}",
                ", ".join(f"{mean[k - 1]:.3f}" for k in (10, 20, 40)),
                *(
                    f"{m:+.3f} [{low:+.3f}, {high:+.3f}]"
                    for m, low, high in (interval(against), ahead, beside)
                ),
                f"{figures[method]['to_match_20_random']:g}",
            ]
        )
    figures["gain_of_weights"] = interval((curves["meta"] - curves["weighted"])[:, COUNT - 1])
    print_table(
        f"{name}: {len(curves['none'])} tasks, {past} trials in each earlier study",
        ["first", "best of 5", "of 10, 20, 40", "gain over none", "over recent", "over named",
         "to match 20"],
        rows,
    )  # fmt: skip
    return figures


def main() -> None:
    """Judges, prints."""
    options = parser(__doc__ or "")
    options.add_argument("--table", type=Path, help="parquet file of the trainings of the images")
    options.add_argument("--past", type=int, nargs="+", default=[15, 40])
    options.add_argument("--searches", type=int, default=0, help="per task (30; quick: 4)")
    asked = options.parse_args()
    searches = asked.searches or (4 if asked.quick else 30)
    table = image_table(asked.table, asked.quick)
    families: dict[str, Callable[[], Family]] = {
        "images": lambda: images(table, deep=False, strangers=False),
        "strangers": lambda: images(table, deep=False, strangers=True),
        "mixed": lambda: images(table, deep=True, strangers=False),
    }
    if CURVES.exists():
        families = {"taskset": taskset, **families}
    figures: dict[str, Any] = {"machine": machine(), "searches": searches}
    bars = []
    for name, make in families.items():
        if asked.quick and name == "strangers":
            continue
        family = make()
        figures[f"{name}_alikeness"] = alikeness(family)
        print(f"\n{name}: distance of features against rank correlation of regrets, Spearman "
              f"{figures[f'{name}_alikeness']:+.2f}")  # fmt: skip
        for past in asked.past:
            found = show(name, past, judge(family, past, searches))
            figures[f"{name}_{past}"] = found
            bars += [
                Bar(
                    f"{name}, {past}: gain over {other}, lower end of its interval",
                    found["meta"][f"gain_over_{other}"][1],
                    0,
                    at_most=False,
                )
                for other in ("none", "recent", "named")
            ]
        if name == "taskset":
            asha = with_scheduler(family, asked.past[-1], max(2, searches // 3))
            figures["taskset_asha"] = {m: c.mean(axis=0).tolist() for m, c in asha.items()}
            print_table(
                "TaskSet with the scheduler asha: regret after 2, 5, 10 full trainings",
                ["first", "2", "5", "10"],
                [[m, *(f"{v:.3f}" for v in c.mean(axis=0))] for m, c in asha.items()],
            )
    finish(figures, bars, asked.json)


if __name__ == "__main__":
    main()
