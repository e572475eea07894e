"""The names under which results are saved, and the older names they went by.

Records become plain data by `to_arrays()` and `summary()`; their keys are the names of the fields.
A collection of results is saved under `SECTION/...` keys. Scripts and dashboards made for the
projects that this one grew out of look for other names, so `with_aliases` adds those: the one place
that knows them.

A key may contain `{layer}`, `{index}` (from 1) or `{measure}`; they stand for the same text in the
alias. Aliases are values copied, never files renamed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

ALIASES: dict[str, tuple[str, ...]] = {
    # curvature
    "spectrum/eigenvalue_{index}": ("hessian_top_eig_{index}",),
    "spectrum/values": ("top_k",),
    "spectrum/trace": ("hessian_trace_estimate", "hutchinson_trace"),
    "spectrum/top_sum": ("hessian_partial_topk_sum",),
    "spectrum/top_share": ("hessian_trace_fraction_topk",),
    "spectrum/re": ("hesd_re",),
    "spectrum/khn": ("hesd_khn",),
    "spectrum/negative_fraction": ("hessian_negative_fraction",),
    "spectrum/negative_mass": ("hessian_negative_mass",),
    "spectrum/positive_mass": ("hessian_positive_mass",),
    "spectrum/zero_mass": ("hessian_zero_mass",),
    "spectrum/mass_balance": ("hessian_signed_mass_balance",),
    "spectrum/smallest": ("hessian_min_eigenvalue", "lam_min"),
    "spectrum/largest": ("hessian_max_eigenvalue", "lam_max"),
    # planes
    "surface/random/loss": ("plane_random_dirs",),
    "surface/hessian/loss": ("plane_hessian",),
    "surface/hessian_signed/loss": ("plane_hessian_signed",),
    "surface/hessian/robust": ("sam_surface",),
    "line/loss": ("interp_1d",),
    "connectivity/loss": ("mode_curve",),
    # ranks
    "ranks/{layer}/matrix": ("layer_{layer}_actual_rank",),
    "ranks/{layer}/effective": ("{layer}_effective_rank",),
    "ranks/{layer}/approximate": ("{layer}_approximate_rank", "{layer}_approx_rank"),
    "ranks/{layer}/l1": ("{layer}_l1_distribution_rank",),
    "ranks/{layer}/numerical": ("{layer}_numerical_rank",),
    "ranks/{layer}/gini": ("{layer}_gini_sv",),
    "rank_dynamics/{measure}/drop_gini": ("{measure}_rank_drop_gini",),
    "rank_dynamics/{measure}/drop_centroid": ("{measure}_rank_decay_centroid",),
    "rank_dynamics/{measure}/rank_centroid": ("{measure}_rank_weighted",),
    "rank_dynamics/{measure}/area": ("{measure}_normalized_aurc",),
    # units and sizes
    "units/{layer}/num_dead": ("layer_{layer}_num_dead_units",),
    "sizes/{layer}/mean_absolute_weight": ("{layer}_mean_abs_weight",),
    # sharpness
    "sharpness/noise": ("sharpness",),
}


def aliases_of(key: str) -> tuple[str, ...]:
    """The older names of one key; none for a key that never had another.

    >>> aliases_of("ranks/fc1/effective")
    ('fc1_effective_rank',)
    """
    for pattern, names in ALIASES.items():
        found = _expression(pattern).fullmatch(key)
        if found is not None:
            return tuple(name.format(**found.groupdict()) for name in names)
    return ()


def with_aliases(values: Mapping[str, Value]) -> dict[str, Value]:
    """The same values under their own keys and under the older ones.

    Raises:
        ValueError: An older name is also the key of something else.
    """
    found = dict(values)
    for key, value in values.items():
        for name in aliases_of(key):
            if name in found:
                raise ValueError(f"{name!r} is already a key and cannot stand for {key!r} too")
            found[name] = value
    return found


def under(section: str, values: Mapping[str, Value]) -> dict[str, Value]:
    """The values with `section/` in front of every key.

    >>> under("line", {"loss": 1.0})
    {'line/loss': 1.0}
    """
    return {f"{section}/{key}": value for key, value in values.items()}


def _expression(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern)
    for name, what in (("layer", ".+"), ("index", "[0-9]+"), ("measure", "[^/]+")):
        escaped = escaped.replace(re.escape("{" + name + "}"), f"(?P<{name}>{what})")
    return re.compile(escaped)
