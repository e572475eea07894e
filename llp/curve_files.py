"""Reads tables of learning curves from files, for fitting and judging the prior of `llp.probing`.

Layouts, told apart by their columns or arrays:

- *long* (parquet or CSV): `task`, `curve`, `position`, `value`, and where known `source`,
  `higher_is_better`, `schedule_remaining`;
- *AlgoPerf* (parquet): `run_id`, `global_step`, `val_...`, and `NAME_runs.parquet` beside
  `NAME_curves.parquet` with `run_id`, `workload`, `submission`;
- *TaskSet* (npz): `valid_i` and `train_i` [configuration, evaluation], `hp_i`, `hp_names`,
  `task_names`;
- *LCDB* (npz): `curves` [dataset, learner, (mean, stderr), anchor, (train, val, test)], `anchors`,
  `dataset_ids`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llp.errors import DataError
from llp.probing.curve_tables import CurveTable

Floats = NDArray[np.float64]

MIN_POINTS = 10
"""Curves with fewer points are left out."""
PRIMARY = ("val_wer", "val_mean_average_precision", "val_bleu", "val_ssim", "val_accuracy")
LOSSES = ("val_ctc_loss", "val_loss")
LOWER_IS_BETTER = ("val_wer", *LOSSES)
CONSTANT_RATE = ("schedule_free",)
"""Submissions to AlgoPerf whose learning rate does not decay, by the start of their names."""
STEPS_PER_EVALUATION = 200
"""Optimizer steps between two evaluations of TaskSet (10,000 steps, 51 evaluations)."""
ALGOPERF_WEIGHT = 3.0
"""`CurveTable.weight`; the tasks of AlgoPerf are few and unlike each other. On workloads left out,
mean errors at 10, 20 and 40 % were .119, .103 and .073 with four times the weight of other sources,
.139, .110 and .074 with the same (short fits)."""
ALGOPERF_SPREAD = 0.5
LONG_SPREAD = 0.3
"""`CurveTable.task_spread`: of AlgoPerf chosen for its coverage on workloads left out (0.3 to 0.7
are alike; without it 90 % intervals cover 75 %), of others in between."""

WORDS = ("true", "false", "yes", "no", "1", "0")
TRUTH = {word: word in WORDS[::2] for word in WORDS} | {"1.0": True, "0.0": False}


def read_tables(paths: Sequence[str | Path]) -> list[CurveTable]:
    """The tables in the files.

    Raises:
        DataError: A file cannot be read or has none of the layouts.
    """
    found = [table for path in paths for table in _read(Path(path))]
    if not any(table.judged for table in found):
        raise DataError("the files hold no learning curve with enough points")
    return found


def _read(path: Path) -> Iterator[CurveTable]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                yield from _arrays(path, {name: arrays[name] for name in arrays.files})
            return
        frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the table {path}: {error}") from error
    columns = set(frame.columns)
    if {"task", "curve", "position", "value"} <= columns:
        yield from _long(_checked(frame, path), path.stem)
    elif {"run_id", "global_step"} <= columns:
        beside = path.with_name(path.name.replace("_curves", "_runs"))
        if beside == path or not beside.exists():
            raise DataError(f"{path}: needs NAME_runs.parquet beside NAME_curves.parquet")
        yield from _algoperf(frame, pd.read_parquet(beside))
    else:
        raise DataError(
            f"{path}: no known layout; a long table has the columns task, curve, position, value"
        )


def _arrays(path: Path, arrays: dict[str, Any]) -> Iterator[CurveTable]:
    if {"task_names", "valid_0", "hp_0", "hp_names"} <= set(arrays):
        yield from _taskset(arrays)
    elif {"curves", "anchors", "dataset_ids"} <= set(arrays):
        yield from _lcdb(arrays)
    else:
        raise DataError(f"{path}: has neither the arrays of TaskSet nor those of LCDB")


def _taskset(arrays: dict[str, Any]) -> Iterator[CurveTable]:
    names = [str(name) for name in arrays["hp_names"]]
    for number, task in enumerate(arrays["task_names"]):
        decays = arrays[f"hp_{number}"].astype(float)
        linear, exponential = (
            decays[:, names.index(f"{kind}_decay")] for kind in ("linear", "exponential")
        )
        num, length = arrays[f"valid_{number}"].shape
        step = np.arange(length) * STEPS_PER_EVALUATION
        rate = np.clip(1 - linear[:, None] * step, 0, 1) * np.exp(-exponential[:, None] * step)
        for split in ("valid", "train"):
            yield CurveTable(
                "taskset",
                str(task),
                np.tile(np.arange(1.0, length + 1), (num, 1)),
                arrays[f"{split}_{number}"].astype(float),
                np.full(num, float(length)),
                rate - rate[:, -1:],
                judged=split == "valid",
            )


def _lcdb(arrays: dict[str, Any]) -> Iterator[CurveTable]:
    sizes = arrays["anchors"].astype(float)
    for curves, task in zip(arrays["curves"], arrays["dataset_ids"], strict=True):
        for number, judged in ((1, True), (2, False)):
            values = curves[:, 0, :, number].astype(float)
            values = values[np.isfinite(values).sum(axis=1) >= MIN_POINTS]
            if len(values):
                positions = np.where(np.isfinite(values), sizes, np.nan)
                yield CurveTable(
                    "lcdb",
                    str(task),
                    positions,
                    values,
                    np.nanmax(positions, axis=1),
                    judged=judged,
                    natural_unit=True,
                )


def _algoperf(curves: pd.DataFrame, runs: pd.DataFrame) -> Iterator[CurveTable]:
    about = runs.set_index("run_id")
    curves = curves.assign(workload=curves["run_id"].map(about["workload"]))
    for workload, frame in curves.groupby("workload"):
        metrics = [c for c in (*PRIMARY, *LOSSES) if c in frame and bool(frame[c].notna().any())]
        for place, metric in enumerate(metrics[:1] + [m for m in metrics[1:] if m in LOSSES]):
            sign = 1.0 if metric in LOWER_IS_BETTER else -1.0
            known = frame[["run_id", "global_step", metric]].dropna()
            rows = [
                (
                    run["global_step"].to_numpy(float),
                    sign * run[metric].to_numpy(float),
                    str(about.loc[cast(str, name), "submission"]).startswith(CONSTANT_RATE),
                )
                for name, run in known.sort_values("global_step", kind="stable").groupby("run_id")
            ]
            table = _padded("algoperf", str(workload), rows, judged=place == 0)
            if table is not None:
                yield table


def _padded(
    source: str, task: str, rows: Sequence[tuple[Floats, Floats, bool]], *, judged: bool
) -> CurveTable | None:
    """Curves (steps, values, whether the rate is constant), a step's last value counting."""
    kept = []
    for steps, values, constant in rows:
        last = np.append(np.diff(steps) > 0, True)
        if last.sum() >= MIN_POINTS:
            kept.append((steps[last], values[last], constant))
    if not kept:
        return None
    width = max(len(steps) for steps, _, _ in kept)
    positions = np.full((len(kept), width), np.nan)
    values, remaining = positions.copy(), positions.copy()
    for row, (steps, curve, constant) in enumerate(kept):
        positions[row, : len(steps)] = steps
        values[row, : len(steps)] = curve
        remaining[row, : len(steps)] = 0 if constant else 1 - steps / steps[-1]
    return CurveTable(
        source,
        task,
        positions,
        values,
        np.nanmax(positions, axis=1),
        remaining,
        task_spread=ALGOPERF_SPREAD,
        weight=ALGOPERF_WEIGHT,
        judged=judged,
    )


def _checked(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """A long table whose numbers are numbers and whose directions are true or false."""
    for name in ("position", "value", "schedule_remaining"):
        if name in frame:
            numbers = pd.to_numeric(frame[name], errors="coerce")
            wrong = frame[name][numbers.isna() & frame[name].notna()]
            if len(wrong):
                raise DataError(f"{path}: column {name} holds {wrong.iloc[0]!r}, not a number")
            frame = frame.assign(**{name: numbers.astype(float)})
    if "higher_is_better" in frame:
        words = frame["higher_is_better"].map(lambda value: TRUTH.get(str(value).strip().lower()))
        if words.isna().any():
            wrong = frame["higher_is_better"][words.isna()]
            raise DataError(
                f"{path}: column higher_is_better holds {wrong.iloc[0]!r}; "
                f"give one of {', '.join(WORDS)}"
            )
        frame = frame.assign(higher_is_better=words.astype(bool))
    return frame


def _long(frame: pd.DataFrame, name: str) -> Iterator[CurveTable]:
    if "source" not in frame:
        frame = frame.assign(source=name)
    for (source, task), part in frame.groupby(["source", "task"]):
        higher = "higher_is_better" in part and bool(part["higher_is_better"].iloc[0])
        curves = [
            curve.sort_values("position", kind="stable").drop_duplicates("position", keep="last")
            for _, curve in part.groupby("curve")
        ]
        curves = [curve for curve in curves if curve["value"].notna().sum() >= MIN_POINTS]
        if not curves:
            continue
        width = max(len(curve) for curve in curves)

        def column(name: str, curves: list[pd.DataFrame] = curves, width: int = width) -> Floats:
            return np.stack(
                [
                    np.pad(c[name].to_numpy(float), (0, width - len(c)), constant_values=np.nan)
                    for c in curves
                ]
            )

        positions, values = column("position"), column("value")
        if np.nanmin(positions) <= 0:
            raise DataError(f"{name}: task {task} has a position that is not positive")
        yield CurveTable(
            str(source),
            str(task),
            positions,
            -values if higher else values,
            np.nanmax(positions, axis=1),
            column("schedule_remaining") if "schedule_remaining" in part else None,
            task_spread=LONG_SPREAD,
        )
