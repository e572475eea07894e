"""What is allowed in an experiment and may still not do what it seems to: notes of `llp check`."""

from __future__ import annotations

from llp.errors import Problem
from llp.spec.domains import Choice, Fixed
from llp.spec.schema import Spec


def notes(spec: Spec) -> list[Problem]:
    """Notes on `spec`, each with its place in the file."""
    return [spec.problem(path, message) for path, message in _raised_warmup(spec)]


def _raised_warmup(spec: Spec) -> list[tuple[str, str]]:
    """Searched shares of warm-up that a probe shorter than the full training does not use."""
    least, domain = spec.tier1.warmup_fraction, spec.search_space.get("warmup_fraction")
    if not least or domain is None:
        return []
    values = domain.finite() if isinstance(domain, Choice | Fixed) else [domain.low]
    if min(float(value) for value in values) >= least:
        return []
    pairs = zip(spec.tier1.data_fractions, spec.rung_epochs(), strict=True)
    shorter = [k for k, (share, n) in enumerate(pairs, 1) if share * n < spec.training.epochs]
    if not shorter:
        return []
    rungs = f"rung{'s' if len(shorter) > 1 else ''} {', '.join(map(str, shorter))}"
    message = (
        f"on {rungs} values below tier1.warmup_fraction ({least:g}) count as {least:g}, so these "
        "probes do not tell them apart; only full trainings use them as they are"
    )
    return [("search_space.warmup_fraction", message)]
