"""Which hyperparameters mattered here: what a random forest loses when one is shuffled.

The forest (Breiman, "Random Forests", 2001) predicts a trial's rank in accuracy on the common rung
from its hyperparameters. Importance is the drop of R^2 on held-out trials when one column is
permuted (section 10 there), averaged over five folds and `_REPEATS` permutations. A trial that
diverged or failed takes the lowest rank: breaking training counts as importance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import rankdata, spearmanr
from sklearn.ensemble import RandomForestRegressor

from llp.reporting import formats
from llp.reporting.figures.space import SpaceData
from llp.reporting.palette import LIGHT
from llp.reporting.study import Axis
from llp.reporting.svg import BARS, canvas, drawing, inline, label_width
from llp.reporting.tables import finite

MIN_TRIALS = 12
USABLE = 0.1  # held-out R^2 under which importance means nothing
_FOLDS = 5
_REPEATS = 20
_TREES = 60


@dataclass(frozen=True)
class ImportanceData:
    """Importance of every searched hyperparameter.

    Attributes:
        frame: `name`, `importance` (drop of held-out R^2), `spread` (standard deviation over
            permutations), `correlation` (Spearman's, for numbers), `num_trials` (of which the
            correlation is made); most important first.
        held_out: R^2 of the forest on held-out trials; NaN under `MIN_TRIALS` trials.
        num_trials: Trials used.
    """

    frame: pd.DataFrame
    held_out: float
    num_trials: int


def importance_data(space: SpaceData) -> ImportanceData:
    """Importance within the trials that ran on the common rung; the same for the same trials."""
    frame = space.frame
    failed = frame[frame["group"] == "failed"]
    frame = pd.concat([finite(frame, "accuracy"), failed]).drop_duplicates("trial_id").sort_index()
    accuracy = frame["accuracy"].to_numpy(dtype=float)
    ranks = rankdata(np.where(np.isfinite(accuracy), accuracy, -np.inf)) / max(len(accuracy), 1)
    num = len(ranks)
    blocks = [
        _encode(axis, frame[f"axis {i}"].tolist()) if num else np.zeros((0, 1))
        for i, axis in enumerate(space.axes)
    ]
    drops = np.full((len(blocks), _REPEATS), math.nan)
    held_out = math.nan
    if num >= MIN_TRIALS and blocks and len(set(ranks)) > 1:
        held_out, drops = _permutation_drops(blocks, ranks)
    rows = []
    for i, axis in enumerate(space.axes):
        positions = np.array([axis.position(raw) for raw in frame[f"axis {i}"]], dtype=float)
        active = np.isfinite(positions)
        correlation = math.nan
        varied = len(set(positions[active])) > 2 and len(set(ranks[active])) > 1
        if varied and not axis.categories:
            correlation = float(spearmanr(positions[active], ranks[active]).statistic)
        rows.append((axis.name, drops[i].mean(), drops[i].std(), correlation, int(active.sum())))
    columns = ["name", "importance", "spread", "correlation", "num_trials"]
    table = pd.DataFrame(rows, columns=columns)
    table = table.sort_values("importance", ascending=False, kind="stable", ignore_index=True)
    return ImportanceData(table, held_out, num)


def importance_reading(data: ImportanceData) -> str:
    """The most important one, with how far the forest can be believed."""
    if math.isnan(data.held_out):
        return (
            f"{formats.plural(data.num_trials, 'trial')} ran on the common rung; importance needs "
            f"at least {MIN_TRIALS} with different results."
        )
    base = f"(held-out R² {formats.signed(data.held_out)}, n = {data.num_trials})"
    if data.held_out < USABLE:
        return f"A forest cannot tell results from the hyperparameters {base}: read nothing here."
    first = data.frame.iloc[0]
    text = f"{formats.short(first['name'], 60)} mattered most"
    clear = first["importance"] > 2 * first["spread"]
    if len(data.frame) > 1 and clear:
        second = data.frame.iloc[1]
        clear = first["importance"] - second["importance"] > first["spread"] + second["spread"]
        if second["importance"] > 2 * second["spread"]:
            text += f"; next is {formats.short(second['name'], 60)}"
    return f"{text} {base}." if clear else f"{text}, but not clearly {base}."


def importance_figure(data: ImportanceData) -> str:
    """A dot and its spread for every hyperparameter."""
    rows = data.frame.head(16).iloc[::-1]
    with drawing():
        names = [formats.short(name, 26) for name in rows["name"]]
        height = 0.55 + 0.22 * max(len(rows), 1)
        figure, axes = canvas((BARS, height), left=label_width(names), bottom=0.42, top=0.05)
        y = range(len(rows))
        axes.axvline(0, color=LIGHT["faint"], linewidth=0.8)
        axes.errorbar(
            rows["importance"],
            y,
            xerr=rows["spread"],
            fmt="o",
            color=LIGHT["blue"],
            markersize=5,
            elinewidth=1.4,
        )
        axes.set_yticks(y, names)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("loss of held-out R² when shuffled")
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
        return inline(
            figure,
            key="importance",
            title="Importance of hyperparameters",
            description=importance_reading(data),
        )


def _encode(axis: Axis, raws: list[object]) -> np.ndarray:
    """Columns for one hyperparameter: one-hot for choices, position and activity for numbers."""
    if axis.categories:
        values = np.array([axis.value(raw) for raw in raws], dtype=float)
        columns = np.arange(len(axis.categories))
        return np.asarray(values[:, None] == columns, dtype=float)
    positions = np.array([axis.position(raw) for raw in raws], dtype=float)
    active = np.isfinite(positions)
    return np.stack([np.where(active, positions, -1.0), active.astype(float)], axis=1)


def _permutation_drops(blocks: list[np.ndarray], target: np.ndarray) -> tuple[float, np.ndarray]:
    """Held-out R^2, and its drop for every block and repeat, pooled over the folds."""
    generator = np.random.default_rng(0)
    features = np.concatenate(blocks, axis=1)
    ends = np.cumsum([block.shape[1] for block in blocks])
    num = len(target)
    fold_of = generator.permutation(np.arange(num) % _FOLDS)
    predicted = np.empty(num)
    shuffled = np.empty((len(blocks), _REPEATS, num))
    for fold in range(_FOLDS):
        test = np.flatnonzero(fold_of == fold)
        train = np.flatnonzero(fold_of != fold)
        forest = RandomForestRegressor(_TREES, min_samples_leaf=2, random_state=fold, n_jobs=1)
        forest.fit(features[train], target[train])
        # Donors come from all trials, so that small folds still see the whole range of values.
        donors = np.stack([generator.permutation(num)[: len(test)] for _ in range(_REPEATS)])
        changed = np.tile(features[test], (len(blocks), _REPEATS, 1, 1))
        for i, (block, end) in enumerate(zip(blocks, ends, strict=True)):
            changed[i, :, :, end - block.shape[1] : end] = block[donors]
        flat = np.concatenate([features[test], changed.reshape(-1, features.shape[1])])
        values = forest.predict(flat)  # at once: a call costs more than its rows
        predicted[test] = values[: len(test)]
        shuffled[:, :, test] = values[len(test) :].reshape(len(blocks), _REPEATS, len(test))
    total = ((target - target.mean()) ** 2).sum()
    held_out = 1 - ((predicted - target) ** 2).sum() / total
    after = 1 - ((shuffled - target) ** 2).sum(axis=2) / total
    return float(held_out), held_out - after
