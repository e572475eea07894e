"""What is wrong with a spec, in our own words: pydantic's findings translated, and printed.

`problems` turns a `ValidationError` into `Problem`s: no union tags in the path, an unknown key with
the nearest valid one, and no "missing" beside the misspelling that explains it. `render` prints
problems as a compiler does, with the source line and a caret.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from llp.errors import Problem, SpecError, nearest, unknown
from llp.spec.domains import DOMAINS
from llp.spec.schema import Spec
from llp.spec.secrets import masked
from llp.spec.source import MAX_BYTES, Parts, Source, as_parts

MAX_SHOWN = 25
"""Problems that `render` prints in full."""

ALSO_KNOWN_AS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "max_trials": "num_trials",
    "n_trials": "num_trials",
    "num_samples": "num_trials",
    "fractions": "data_fractions",
    "eta": "reduction_factor",
    "seeds": "num_seeds",
    "val_fraction": "validation_fraction",
    "parameters": "search_space",
    "space": "search_space",
    "min": "low",
    "max": "high",
    "grace_period": "data_fractions",
    "gpus": "gpus_per_trial",
    "cpus": "cpus_per_trial",
    "data": "dataset",
}
"""Names that other tools use."""

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "mapping_type": "a mapping of keys to values",
}
_LIMITS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def suggest(name: str, choices: Iterable[str]) -> str | None:
    """The valid key that `name` probably means, also when another tool calls it so."""
    keys = set(choices)
    names = {key: key for key in keys}
    names.update({other: key for other, key in ALSO_KNOWN_AS.items() if key in keys})
    if name in names:
        return names[name]
    guess = nearest(name, [other for other in names if len(other) > 3])
    return names[guess] if guess else None


def shown(value: Any) -> str:
    """`value` as a message quotes it: short, on one line, in YAML's words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + "..." + text[-1]


def message(found: Mapping[str, Any]) -> str:
    """One of pydantic's `errors()` in our words."""
    kind, value, context = found["type"], found.get("input"), found.get("ctx", {})
    if kind == "llp":
        return str(context["message"])
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}, not {shown(value)}"
    if kind in _LIMITS:
        word, key = _LIMITS[kind]
        return f"must be {word} {context[key]:g}, not {shown(value)}"
    if kind == "missing":
        return f"missing key '{found['loc'][-1]}'"
    if kind == "finite_number":
        return f"must be a finite number, not {shown(value)}"
    if kind == "too_short":
        return "needs at least one value"
    if kind == "literal_error":
        return _literal(value, str(context["expected"]))
    if kind == "union_tag_invalid":
        return unknown("domain type", context["tag"], DOMAINS)
    if kind == "union_tag_not_found":
        return f"missing key 'type'; choose one of: {', '.join(sorted(DOMAINS))}"
    if kind == "string_pattern_mismatch":
        return (
            f"{shown(value)} may hold letters, digits, '.', '_' and '-' only, at most 64, and "
            "starts with a letter or digit"
        )
    return str(found["msg"]).removeprefix("Value error, ")


def problems(
    error: ValidationError, data: Any, source: Source, schema: type[BaseModel] = Spec
) -> list[Problem]:
    """What pydantic found in `data`, in our words and with places; at most one per path.

    Args:
        error: Raised by `schema`.
        data: What was validated.
        source: Where its parts were written.
        schema: What `data` should have been.
    """
    found = error.errors(include_url=False)
    cleaned = [_path(item["loc"], data, item["type"]) for item in found]
    guesses: dict[Parts, set[str]] = {}
    grouped: dict[tuple[Parts, bool], list[str]] = {}
    deeper = {path[:length] for path, _ in cleaned for length in range(len(path))}
    for item, (path, in_union) in zip(found, cleaned, strict=True):
        if in_union and item["type"] in _EXPECTED and path in deeper:
            continue  # another member of the union got further into the value
        text, at_key = message(item), False
        if item["type"] == "extra_forbidden":
            text, guess = _unknown_key(path, data, schema)
            guesses.setdefault(path[:-1], set()).add(guess or "")
            at_key = True
        elif item["type"] == "llp":
            path = _pointed_at(path, item.get("ctx", {}).get("at", ()), source)
        elif item["type"] == "union_tag_invalid":
            path = (*path, "type")
        grouped.setdefault((path, at_key or item["type"] == "missing"), []).append(text)
    return [
        source.problem(path, _joined(texts), key=at_key)
        for (path, at_key), texts in grouped.items()
        if not (texts[0].startswith("missing key") and path[-1] in guesses.get(path[:-1], set()))
    ]


def render(error: SpecError | Iterable[Problem], *, width: int = 100) -> str:
    """The problems as text for a terminal: place, path and message, source line, caret.

    The file is read again for its lines; what is not there any more is left out.
    """
    listed = list(error.problems if isinstance(error, SpecError) else error)
    lines: list[str] = []
    for problem in listed[:MAX_SHOWN]:
        lines.append(_printable(f"error: {problem}"))
        lines.extend(_excerpt(problem, width))
    if len(listed) > MAX_SHOWN:
        lines.append(f"and {len(listed) - MAX_SHOWN} more")
    return "\n".join(lines)


def known_keys(path: Parts, data: Any, schema: type[BaseModel] = Spec) -> list[str]:
    """The keys that the mapping at `path` may hold."""
    model: Any = schema
    if len(path) == 2 and path[0] == "search_space":
        domain = data["search_space"][path[1]]
        model = DOMAINS.get(str(domain.get("type"))) if isinstance(domain, dict) else None
    elif path:
        model = schema.model_fields[str(path[0])].annotation if len(path) == 1 else None
    return list(model.model_fields) if model else []


def _unknown_key(path: Parts, data: Any, schema: type[BaseModel] = Spec) -> tuple[str, str | None]:
    name, known = str(path[-1]), known_keys(path[:-1], data, schema)
    guess = suggest(name, known)
    if guess:
        return f"unknown key '{name}'; did you mean '{guess}'?", guess
    homes = [
        section
        for section, info in schema.model_fields.items()
        if name in getattr(info.annotation, "model_fields", {})
    ]
    if homes and path[0] != "search_space":
        return f"unknown key '{name}' here; it belongs to {' or '.join(homes)}", None
    return f"unknown key '{name}'; choose one of: {', '.join(known)}", None


def _path(loc: tuple[str | int, ...], data: Any, kind: str) -> tuple[Parts, bool]:
    """`loc` without union tags, and whether there were any."""
    path: list[str | int] = []
    node, in_union = data, False
    for depth, part in enumerate(loc):
        inside = (isinstance(node, dict) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        )
        if inside:
            path.append(part)
            node = node[part]
        elif depth == len(loc) - 1 and kind == "missing":
            path.append(part)
        else:
            in_union = True
    return tuple(path), in_union


def _pointed_at(path: Parts, candidates: Iterable[str], source: Source) -> Parts:
    """The path that a validator points to: the candidate a user gave, an override first."""
    paths = [path + as_parts(candidate) for candidate in candidates]
    return max(paths, key=source.given) if paths else path


def _joined(texts: list[str]) -> str:
    """One message of several for the same place: those of a union's members are combined."""
    distinct = list(dict.fromkeys(texts))
    if len(distinct) == 1:
        return distinct[0]
    start = "must be "
    wanted = [text[len(start) :].split(", not ")[0] for text in distinct if text.startswith(start)]
    if len(wanted) < len(distinct):
        return "; ".join(distinct)
    if "a number" in wanted:
        wanted = [text for text in wanted if text != "a whole number"]
    got = distinct[0].split(", not ")[-1]
    return f"{start}{', '.join(wanted[:-1])} or {wanted[-1]}, not {got}"


def _literal(value: Any, expected: str) -> str:
    choices = [part.strip("' ") for part in expected.replace(" or ", ", ").split(",")]
    if len(choices) == 1:
        return f"must be {choices[0]}, not {shown(value)}"
    return unknown("value", value, choices)


def _excerpt(problem: Problem, width: int) -> list[str]:
    if not problem.line:
        return []
    try:
        with Path(problem.file).open("rb") as file:
            text = file.read(MAX_BYTES).decode("utf-8-sig", "replace")
        row = text.splitlines()[problem.line - 1]
    except (OSError, IndexError):
        return []
    row = masked(_printable(row))
    start = max(0, problem.column - width // 2) if len(row) > width else 0
    margin = f"{problem.line:>5} | "
    caret = " " * (len(margin) + problem.column - 1 - start) + "^"
    return [margin + row[start : start + width], caret]


def _printable(text: str) -> str:
    """`text` without control characters, which could drive the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
