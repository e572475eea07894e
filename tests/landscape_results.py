"""Results of a landscape made by hand: every kind of part, with numbers that are known."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
X = np.linspace(-1.0, 1.0, 25)
Y = np.linspace(-2.0, 2.0, 21)
MINIMUM = (0.5, -1.0)
"""Where `asymmetric` has its minimum: a cell of the grid, off the centre on both axes."""


def asymmetric(x: Array, y: Array) -> Array:
    """A bowl that is different along x and y, tilted, and lowest at `MINIMUM`."""
    a, b = x - MINIMUM[0], y - MINIMUM[1]
    found: Array = 0.05 + 4 * a**2 + b**2 + 0.8 * a * b
    return found


def surface(name: str, *, robust: bool = False) -> tuple[dict[str, Any], dict[str, Array]]:
    """A surface part: `loss[i, j]` at `(x[i], y[j])`."""
    across, up = np.meshgrid(X, Y, indexing="ij")
    loss = asymmetric(across, up)
    arrays = {"x": X, "y": Y, "loss": loss, "metric": np.clip(1 - loss / 10, 0, 1)}
    arrays["exact"] = np.ones(loss.shape, dtype=bool)
    if robust:
        arrays["robust"] = loss + 0.1 * (1 + across**2)
    numbers = {
        "base_loss": float(asymmetric(np.asarray(0.0), np.asarray(0.0))),
        "base_metric": 0.9,
        "label_1": "first direction",
        "label_2": "second direction",
        "norm_1": 12.5,
        "norm_2": 11.0,
        "direction_kind": name.rpartition("/")[2],
        "rho": 0.05 if robust else 0.0,
        "seconds": 1.0,
    }
    return under(name, numbers), under(name, arrays)


def under(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Keys with the part's name in front."""
    return {f"{name}/{key}": value for key, value in values.items()}


def make_results(evil: str = "") -> tuple[dict[str, Any], dict[str, Array]]:
    """`landscape.json` and `landscape.npz` with all sections; `evil` stands in every free text."""
    values: dict[str, Any] = {}
    arrays: dict[str, Array] = {}
    parts: dict[str, str] = {}
    rows: dict[str, list[dict[str, Any]]] = {}

    def add(name: str, analysis: str, numbers: dict[str, Any], more: dict[str, Array]) -> None:
        parts[name] = analysis
        values.update(numbers)
        arrays.update(more)

    add("surface/random", "surfaces", *surface("surface/random", robust=True))
    add("surface/trajectory", "surfaces", *surface("surface/trajectory"))
    values["surface/random/label_1"] = f"first direction{evil}"
    x = np.linspace(-1, 1, 11)
    add(
        "line/hessian",
        "lines",
        under(
            "line/hessian",
            {
                "base_loss": 1.0,
                "base_metric": 0.5,
                "label_1": f"eigenvector of 4{evil}",
                "value_1": 4.0,
                "direction_kind": "hessian",
            },
        ),
        under("line/hessian", {"x": x, "loss": 1 + x + 2 * x**2, "metric": 1 - x**2 / 2}),
    )
    epochs = np.arange(4)
    add(
        "trajectory",
        "trajectory",
        under("trajectory", {"label_1": "component 1", "label_2": "component 2"}),
        under(
            "trajectory",
            {
                "epoch": epochs,
                "coordinates": np.stack([0.9 - 0.3 * epochs, 1.5 - 0.5 * epochs], axis=1),
                "loss": np.array([2.3, 1.0, 0.5, 0.25]),
                "metric": np.array([0.1, 0.5, 0.7, 0.9]),
                "plane_loss": np.array([2.1, 1.4, 0.6, 0.25]),
                "out_of_plane": np.array([0.8, 1.2, 0.4, 0.0]),
                "distance": np.array([3.0, 2.0, 1.0, 0.0]),
                "explained": np.array([0.7, 0.2]),
            },
        ),
    )
    grid = np.linspace(-2.0, 10.0, 200)
    add(
        "spectrum",
        "spectrum",
        under(
            "spectrum",
            {
                "largest": 9.5,
                "smallest": -1.5,
                "trace": 30.0,
                "trace_standard_error": 0.7,
                "trace_half_width": 1.5,
                "negative_fraction": 0.3,
                "density_width": 0.1,
                "num_products": 321,
            },
        ),
        under(
            "spectrum",
            {
                "ends": np.array([9.5, 4.0, -1.5]),
                "ends_residuals": np.array([0.01, 0.2, 0.05]),
                "ends_bounds": np.array([1e-4, 1e-2, 1e-3]),
                "nodes": np.array([[-1.5, -0.01, 0.0, 9.5], [-1.5, -0.01, 4.0, 9.5]]),
                "weights": np.array([[0.2, 0.5, 0.2, 0.1], [0.1, 0.5, 0.3, 0.1]]),
                "density_grid": grid,
                "density": np.exp(-(grid**2) * 4) + 1e-4,
            },
        ),
    )
    for measure, value in (("sam", 0.02), ("asam", 0.3)):
        add(
            f"sharpness/{measure}",
            "sharpness",
            {
                f"sharpness/{measure}": value,
                **under(
                    f"sharpness/{measure}",
                    {
                        "measure": measure,
                        "options": f"rho=0.05{evil}",
                        "standard_error": value / 10,
                        "gradient_equivalents": 4 / 3,
                        "seconds": 0.5,
                    },
                ),
            },
            {},
        )
    t = np.linspace(0, 1, 9)
    for kind, height in (("linear", 2.0), ("curve", 0.1)):
        path = under(
            f"connectivity/{kind}",
            {"t": t, "loss": 0.2 + height * t * (1 - t), "metric": 1 - t / 9},
        )
        told = {"barrier": height / 4, "length": 12.0, "chord": 10.0, "kind": "bezier"}
        add("connectivity", "connectivity", under(f"connectivity/{kind}", told), path)
    rows["ranks"] = rows["weight_ranks"] = [
        {
            "name": f"layer{number}{evil}",
            "matrix": 8,
            "numerical": 7,
            "effective": 6.5 - number,
            "approximate": 5,
            "l1": 6,
            "stable": 2.0,
            "nuclear": 10.0,
            "gini": 0.4,
            "num_rows": 64,
            "num_columns": 8,
        }
        for number in range(3)
    ]
    rows["units"] = [
        {
            "name": f"relu{number}",
            "activation": "relu",
            "num_units": 10,
            "num_dead": number,
            "num_saturated": 0,
            "num_dormant": number + 1,
        }
        for number in range(2)
    ]
    for name in ("ranks", "weight_ranks", "units"):
        parts[name] = "ranks"
    values |= under("units", {"num_units": 20, "num_dead": 1, "num_saturated": 0, "num_dormant": 3})
    steps = np.array([-0.1, -0.01, 0.01, 0.1])
    add(
        "smoothness",
        "smoothness",
        under(
            "smoothness",
            {
                "gradient_norm": 2.0,
                "base_loss": 0.25,
                "effective_beta": 7.0,
                "loss_lipschitz": 3.0,
            },
        ),
        under(
            "smoothness",
            {
                "steps": steps,
                "loss": 0.25 + 4 * steps[None] + steps[None] ** 2,
                "gradient_change": np.abs(steps[None]) * 14,
                "gradient_cosine": np.ones((1, 4)),
                "distance": np.abs(steps[None]) * 2,
            },
        ),
    )
    add(
        "jacobian/output",
        "jacobian",
        under(
            "jacobian/output",
            {"rank": 9, "effective": 4.5, "num_inputs": 64, "num_outputs": 10, "mode": "crop"},
        ),
        {},
    )
    add(
        "confidence",
        "confidence",
        under(
            "confidence",
            {
                "accuracy": 0.75,
                "mean_confidence": 0.8,
                "calibration_error": 0.06,
                "calibration_error_standard_error": 0.02,
                "mean_entropy": 0.4,
                "confidence_gap": 0.05,
            },
        ),
        under(
            "confidence",
            {
                "bin_count": np.array([0, 64, 192]),
                "bin_confidence": np.array([np.nan, 0.5, 0.9]),
                "bin_accuracy": np.array([np.nan, 0.4, 0.87]),
            },
        ),
    )
    point = {
        "rung": 1,
        "data_fraction": 1.0,
        "samples_seen": 100,
        "train_loss": 1.0,
        "train_accuracy": 0.5,
        "validation_loss": 1.1,
        "validation_accuracy": 0.45,
        "seconds": 1.0,
        "learning_rate": 0.1,
    }
    seen = {
        "callback": "curvature",
        "job_id": "run-0",
        "trial_id": "run",
        "samples_seen": 100,
        "samples": 900,
        "seconds": 0.2,
        "note": "",
    }
    told = {"eigenvalue_1": 12.0, "eigenvalue_2": -3.0, "trace": 40.0, "trace_standard_error": 2.0}
    plain = {
        "format": 1,
        "subject": {
            "title": f"mlp on digits{evil}",
            "facts": {"dataset": f"digits{evil}", "measured on": "256 train examples"},
            "curve": [{**point, "epoch": epoch} for epoch in (1, 2, 3)],
            "observations": [
                {**seen, "epoch": epoch, "values": {**told, "gradient_norm": 1.0 / epoch}}
                for epoch in (1, 2, 3)
            ],
        },
        "settings": {"surfaces": {"loss_cap": None}, "ranks": {"measure": "effective"}},
        "values": values,
        "arrays": {key: list(value.shape) for key, value in arrays.items()},
        "aliases": {},
        "rows": rows,
        "about": {},
        "parts": {name: {"analysis": analysis} for name, analysis in parts.items()},
        "missing": {"surface/adam": f"the optimizer's state was not kept{evil}"},
        "environment": {"command": f"llp landscape --train{evil}", "torch": "2"},
    }
    return plain, arrays
