"""Options of models, datasets, optimizers and stop rules: which exist, their type and their range.

An option has the type of its default; those of code outside our tables are read from its signature,
and one without a default takes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from llp import registry
from llp.errors import SpecError, unknown
from llp.spec.wording import shown, suggest

_GIVEN = {
    "models": {"channels", "image_size", "num_classes"},
    "optimizers": {"parameters", "learning_rate", "weight_decay"},
    "averagings": {"model", "num_steps"},
}
"""Arguments that `llp` itself passes, by table."""

_UNIT = (lambda value: 0 <= value < 1, "at least 0 and below 1")
_POSITIVE = (lambda value: value > 0, "above 0")
_NEVER_NEGATIVE = (lambda value: value >= 0, "at least 0")
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "momentum": _UNIT,
    "beta1": _UNIT,
    "beta2": _UNIT,
    "dropout": _UNIT,
    "decay": _UNIT,
    "swa_start": _UNIT,
    "projection_dimension": (lambda value: value >= 2, "at least 2"),
    "newton_schulz_steps": (lambda value: 1 <= value < 100, "at least 1 and below 100"),
    "ema_decay": _UNIT,
    "epsilon": _POSITIVE,
    "rho": _POSITIVE,
    "gamma": _POSITIVE,
    "inner_learning_rate": _POSITIVE,
    "swa_learning_rate": _POSITIVE,
    "eta": _NEVER_NEGATIVE,
    "gamma_growth": _NEVER_NEGATIVE,
    "valley_strength": _NEVER_NEGATIVE,
    "mean_weight": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "smoothing_factor": (lambda value: 0 <= value <= 1, "at least 0 and at most 1"),
    "noise": _NEVER_NEGATIVE,
    "confidence": (lambda value: 0 < value < 1, "above 0 and below 1"),
    "delta": (lambda value: 0 < value < 0.5, "above 0 and below 0.5"),
    "seconds": _POSITIVE,
    "samples": _POSITIVE,
    "accuracy": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "margin": _NEVER_NEGATIVE,
    "learned": (lambda value: 0 < value < 1, "above 0 and below 1"),
    "factor": (lambda value: value > 1, "above 1"),
    "patience_fraction": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
}


def unusable(table: str, name: str, *, without: Iterable[str] = ()) -> str | None:
    """Why `name` is no row of `table` and no importable `module:attribute`; None when it is."""
    if name in registry.TABLES[table]:
        return None
    try:
        registry.find(table, name)
    except SpecError:
        known = set(registry.entries(table)) - set(without)
        return unknown(table.removesuffix("s").replace("_", " "), name, known)
    try:
        found = registry.load(table, name)
    except SpecError as error:
        return error.problems[0].message
    except Exception as error:  # noqa: BLE001  a user's module may raise anything on import
        return f"cannot load '{name}': {type(error).__name__}: {error}"
    return None if callable(found) else f"'{name}' is {shown(found)} and cannot be called"


def known(table: str, name: str) -> dict[str, Any]:
    """Option -> default of a usable `name`; empty when it is not usable."""
    if name in registry.TABLES[table]:
        return dict(registry.TABLES[table][name].options)
    if unusable(table, name):
        return {}
    try:
        options = registry.options(table, name)
    except (TypeError, ValueError):  # no signature, as of some C functions
        return {}
    return {key: value for key, value in options.items() if key not in _GIVEN.get(table, ())}


def faults(
    table: str, names: Sequence[str], given: Mapping[str, Any], path: str
) -> Iterator[tuple[str, str]]:
    """Path and message of each of the `given` options that none of `names` takes, or not so."""
    if any(unusable(table, name) for name in names):
        return
    options = {name: known(table, name) for name in dict.fromkeys(names)}
    every = sorted(set().union(*options.values()))
    for option, value in given.items():
        defaults = [taken[option] for taken in options.values() if option in taken]
        if not defaults:
            kind = table.removesuffix("s").replace("_", " ")
            yield f"{path}.{option}", _no_option(kind, " or ".join(options), option, every)
        elif wrong := fault(option, value, defaults[0], table=table):
            yield f"{path}.{option}", wrong


def fault(option: str, value: Any, default: Any, *, table: str = "") -> str | None:
    """Why `value` is not possible for an option with this `default`; None when it is.

    `table` is that of what the option belongs to, where it is known.

    >>> fault("width", 2.5, 16)
    'must be a whole number, not 2.5'
    """
    for kind, wanted, words in (
        (bool, bool, "true or false"),
        (int, int, "a whole number"),
        (float, (int, float), "a number"),
        (str, str, "text"),
    ):
        if isinstance(default, kind):
            if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
                return f"must be {words}, not {shown(value)}"
            break
    if table == "optimizers" and option == "base":
        return _no_base(value)
    if isinstance(value, bool | str) or not isinstance(value, int | float):
        return None
    if option in _RANGES and not _RANGES[option][0](value):
        return f"must be {_RANGES[option][1]}, not {value:g}"
    if isinstance(default, int) and default >= 1 > value:
        return f"must be at least 1, not {value:g}"
    return None


def _no_base(name: str) -> str | None:
    """Why no optimizer can be put around the optimizer `name`."""
    several = registry.SEVERAL_GRADIENTS
    if name in several:
        others = sorted(set(registry.entries("optimizers")) - set(several))
        return f"'{name}' takes several gradients a step itself; choose one of: {', '.join(others)}"
    return unusable("optimizers", name, without=several)


def _no_option(kind: str, names: str, option: str, known: Sequence[str]) -> str:
    guess = suggest(option, known)
    hint = f"did you mean '{guess}'?" if guess else f"it takes: {', '.join(known) or 'none'}"
    return f"{kind} {names} has no option '{option}'; {hint}"
