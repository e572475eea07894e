"""The Hessian's spectrum: density, trace, both ends and the largest by size, with their errors.

One Krylov set serves almost all of it (`landscape.spectrum_report`). The most negative eigenvalue
has a search of its own, because it seldom is among the largest by size, and so has the most
positive one where all of those are negative; planes along signed eigenvectors need both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from llp import landscape
from llp.analyses.subject import Finding, Part, Subject, Work
from llp.spec.landscape import LandscapeSpec

GRID = 400
"""Points at which the density is drawn."""

ABOUT = {
    "largest_residual": "Residual of the largest eigenvalue.",
    "smallest_residual": "Residual of the smallest eigenvalue.",
    "eigenvalue": "Number n of `values`, as eigenvalue_n.",
    "residual": "Its residual, as residual_n.",
    "trace_standard_error": "Standard error of the trace over probes.",
    "trace_half_width": "Half-width of the 95 % interval around the trace.",
    "trace_method": "Estimator of the trace.",
    "negative_mass": "Weight of the density below 0: the share of negative eigenvalues.",
    "positive_mass": "Weight of the density above 0.",
    "zero_mass": "Weight of the density at 0.",
    "mass_balance": "`positive_mass - negative_mass`.",
    "negative_sum": "Sum of the negative eigenvalues.",
    "positive_sum": "Sum of the positive eigenvalues.",
    "top_sum": "Sum of `values`.",
    "top_share": "`top_sum` over the trace.",
    "ends": "Eigenvalues that were searched for on their own: `values` and both ends.",
    "ends_residuals": "Their residuals.",
    "ends_bounds": "Their estimated errors.",
    "density_grid": "Where `density` was taken.",
    "density": "Share of the eigenvalues per unit, smoothed by a Gaussian.",
    "density_standard_error": "Standard error of `density` over probes.",
    "density_width": "Standard deviation of that Gaussian.",
    "moments": "`tr(H^k) / P` for k = 0 ... 4.",
    "moment_errors": "Their standard errors over probes.",
    "gradient_equivalents": "Cost in gradients: a product counts 2, a graph 1, a forward pass 1/3.",
}
"""What the keys of this part mean, beside those of the records of the library."""


def spectrum(subject: Subject, spec: LandscapeSpec) -> Iterator[Part]:
    """One part, because one Krylov set serves all of it."""
    yield Part(
        name="spectrum",
        analysis="spectrum",
        settings={**spec.spectrum.model_dump(), "seed": spec.seed},
        compute=_compute,
    )


def eigenpairs_of(found: Finding, device: torch.device) -> landscape.Eigenpairs:
    """The eigenpairs whose vectors a spectrum kept: the two largest by size, and both ends."""
    values = torch.from_numpy(found.vectors["values"])
    nothing = torch.zeros_like(values)
    return landscape.Eigenpairs(
        values=values,
        vectors=torch.from_numpy(found.vectors["vectors"]).to(device),
        residuals=nothing,
        bounds=nothing,
        converged=True,
        num_confirming=0,
        num_products=0,
        num_gradients=0,
        num_forwards=0,
        seconds=0.0,
    )


def _compute(work: Work) -> Finding:
    subject, options = work.subject, work.spec.spectrum
    op = landscape.hessian(subject.model, subject.loss_fn, subject.batches)
    numbers: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    if options.density:
        report = landscape.spectrum_report(
            op,
            k=options.num_eigenvalues,
            num_probes=options.num_probes,
            num_steps=options.num_steps,
            trace_error=options.relative_error,
            tolerance=options.tolerance,
            generator=work.generator("spectrum"),
        )
        pairs, trace = report.eigenpairs, report.trace
        _tell_density(report, numbers, arrays)
    else:
        pairs = landscape.top_eigenpairs(
            op,
            options.num_eigenvalues,
            tolerance=options.tolerance,
            generator=work.generator("spectrum"),
            max_products=options.max_products,
        )
        trace = landscape.trace(
            op,
            options.relative_error,
            num_probes=None if options.relative_error else options.num_probes,
            max_probes=options.max_products,
            generator=work.generator("trace"),
        )
    ends = [pairs, *_searched_ends(op, pairs, work)]
    _tell_eigenvalues(ends, trace.value, numbers, arrays)
    numbers |= {
        "trace": trace.value,
        "trace_standard_error": trace.standard_error,
        "trace_half_width": trace.half_width,
        "trace_method": trace.method,
        "converged": all(each.converged for each in ends),
        "num_examples": op.num_examples,
        "num_products": op.num_products,
        "num_gradients": op.num_gradients,
        "num_forwards": op.num_forwards,
        "gradient_equivalents": op.gradient_equivalents,
    }
    op.release()
    return Finding(numbers=numbers, arrays=arrays, vectors=_kept(ends))


def _searched_ends(
    op: landscape.Curvature, pairs: landscape.Eigenpairs, work: Work
) -> list[landscape.Eigenpairs]:
    """The smallest eigenvalue, and the largest where none of `pairs` is positive."""
    options = work.spec.spectrum
    found = []
    for end, there in (("smallest", False), ("largest", bool((pairs.values > 0).any()))):
        if not there:
            found.append(
                landscape.top_eigenpairs(
                    op,
                    1,
                    "smallest" if end == "smallest" else "largest",
                    options.tolerance,
                    generator=work.generator(f"spectrum {end}"),
                    max_products=options.max_products,
                )
            )
    return found


def _tell_eigenvalues(
    ends: list[landscape.Eigenpairs], trace: float, numbers: dict[str, Any], arrays: dict[str, Any]
) -> None:
    top = ends[0]
    arrays |= {
        "values": top.values.numpy(),
        "residuals": top.residuals.numpy(),
        "bounds": top.bounds.numpy(),
    }
    for number, (value, residual) in enumerate(
        zip(top.values.tolist(), top.residuals.tolist(), strict=True), start=1
    ):
        numbers[f"eigenvalue_{number}"] = value
        numbers[f"residual_{number}"] = residual
    total = float(top.values.sum())
    numbers |= {"top_sum": total, "top_share": total / trace if trace else float("nan")}
    chosen = _distinct(ends)
    for key, field in (
        ("ends", "values"),
        ("ends_residuals", "residuals"),
        ("ends_bounds", "bounds"),
    ):
        arrays[key] = np.asarray([float(getattr(pairs, field)[index]) for pairs, index in chosen])
    for name, place in (("largest", np.argmax), ("smallest", np.argmin)):
        index = int(place(arrays["ends"]))
        numbers[name] = float(arrays["ends"][index])
        numbers[f"{name}_residual"] = float(arrays["ends_residuals"][index])
    numbers["re"] = abs(numbers["smallest"] / numbers["largest"]) if numbers["largest"] else None


def _distinct(ends: list[landscape.Eigenpairs]) -> list[tuple[landscape.Eigenpairs, int]]:
    """Every eigenpair once: a vector that two searches found counts for the first."""
    kept: list[tuple[landscape.Eigenpairs, int]] = []
    for pairs in ends:
        for index in range(len(pairs.values)):
            vector = pairs.vectors[:, index]
            if all(abs(float(vector @ p.vectors[:, i])) < 0.5 for p, i in kept):
                kept.append((pairs, index))
    return kept


def _kept(ends: list[landscape.Eigenpairs]) -> dict[str, Any]:
    """The vectors that planes need: the two largest by size and those of the ends."""
    chosen = _distinct(ends)
    values = np.asarray([float(pairs.values[index]) for pairs, index in chosen])
    wanted = dict.fromkeys([*np.argsort(-np.abs(values))[:2], values.argmax(), values.argmin()])
    rows = [chosen[int(place)][0].vectors[:, chosen[int(place)][1]] for place in wanted]
    return {
        "values": values[[int(place) for place in wanted]],
        "vectors": torch.stack(rows, dim=1).cpu().numpy(),
    }


def _tell_density(
    report: landscape.SpectrumReport, numbers: dict[str, Any], arrays: dict[str, Any]
) -> None:
    density = report.density
    low, high = float(density.nodes.min()), float(density.nodes.max())
    room = 4 * density.default_width
    grid = torch.linspace(low - room, high + room, GRID, dtype=torch.float64)
    seen = density.density_samples(grid)
    negative, zero = report.negative_fraction, report.zero_fraction
    positive = 1.0 - negative.value - zero.value
    arrays |= {
        "nodes": density.nodes.numpy(),
        "weights": density.weights.numpy(),
        "density_grid": grid.numpy(),
        "density": seen.mean(0).numpy(),
        "density_standard_error": (seen.std(0) / len(seen) ** 0.5).numpy(),
        "moments": density.moments.numpy(),
        "moment_errors": density.moment_errors.numpy(),
    }
    numbers |= {
        "density_width": density.default_width,
        "orthogonality": density.orthogonality,
        "negative_fraction": negative.value,
        "negative_fraction_standard_error": negative.standard_error,
        "zero_fraction": zero.value,
        "negative_mass": negative.value,
        "positive_mass": positive,
        "zero_mass": zero.value,
        "mass_balance": positive - negative.value,
        "negative_sum": report.negative_mass.value,
        "negative_sum_standard_error": report.negative_mass.standard_error,
        "positive_sum": report.positive_mass.value,
        "positive_sum_standard_error": report.positive_mass.standard_error,
        "frobenius_norm": report.frobenius_norm.value,
        "frobenius_norm_standard_error": report.frobenius_norm.standard_error,
        "khn": report.khn.value,
        "khn_standard_error": report.khn.standard_error,
        "condition_of_top": report.condition_of_top,
        "condition_of_mean": report.condition_of_mean,
    }
