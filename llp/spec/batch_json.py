"""The JSON batches of the TALT project as batch files: every field mapped, or refused by name.

Such a file is `{"experiments": [{"name": ..., "architecture": ..., "dataset": ..., "optimizer":
..., "epochs": ..., "lr": ..., ...}, ...]}`; its keys are the options of that project's command for
one experiment, with dashes or underscores. Fields that say where or how a training runs and not
what it trains (GPU numbers, worker processes) are left out with a note. Fields that have no
counterpart here are refused, because a run without them would be another experiment under the old
name; `drop` leaves them out knowingly.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from llp.errors import Problem, SpecError, unknown
from llp.spec import loading, wording
from llp.spec.batch import NAME, Batch, batch_of
from llp.spec.matrix import ordered
from llp.spec.source import Source, parse, read

ARCHITECTURES = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "vgg16": "vgg16",
    "simplecnn": "convnet",
}
DATASETS = {"cifar10": "cifar10", "cifar100": "cifar100", "mnist": "mnist"}
OPTIMIZERS = {"talt": "talt", "improved-talt": "talt", "sgd": "sgd", "adam": "adam"}
NO_COUNTERPART = {
    "architecture": {
        "efficientnet-b0": "llp has no EfficientNet; name your own as module:function",
        "bert-base": "llp has no BERT; name your own as module:function",
    },
    "dataset": {"glue-sst2": "llp has no text; name your own dataset as module:function"},
    "optimizer": {"original-talt": "llp has one TALT; use talt"},
}
HYPERPARAMETERS = {
    "lr": "learning_rate",
    "weight-decay": "weight_decay",
    "batch-size": "batch_size",
    "momentum": "momentum",
    "projection-dim": "projection_dimension",
    "update-interval": "update_interval",
    "valley-strength": "valley_strength",
    "smoothing-factor": "smoothing_factor",
    "cov-decay": "decay",
    "min-param-size": "min_size",
}
TALT_ONLY = (
    *("projection-dim", "update-interval", "valley-strength", "smoothing-factor"),
    *("cov-decay", "min-param-size"),
)
LEFT_OUT = {
    "gpu-index": "Ray places the trainings",
    "num-workers": "images lie in memory",
    "save-checkpoints": "the final weights are always kept",
    "checkpoint-interval": "snapshots are made by the clock",
    "output-dir": "the folder is defaults.output.root",
    "study-name": "it named the tuning",
    "n-trials": "it belonged to the tuning",
    "debug": "`llp --debug batch` shows tracebacks",
}
REFUSED = {
    "tune-hyperparams": "write a grid and `choose: {}`, or use `llp search`",
    "resume-from": "a batch trains from the start, and resumes by itself",
    "memory-size": "TALT here weights gradients by `decay` and keeps no list of them",
    "grad-store-interval": "TALT here looks at every gradient",
    "max-param-size": "TALT here projects, so that no tensor is too large",
    "adaptive-reg": "TALT here needs no regularization of its covariance",
}
_KNOWN = {
    *("name", "architecture", "dataset", "optimizer", "epochs", "mixed-precision", "seed"),
    *HYPERPARAMETERS,
    *LEFT_OUT,
    *REFUSED,
}


@dataclass(frozen=True)
class Converted:
    """A converted batch.

    Attributes:
        yaml: The batch file.
        notes: What was left out or is not quite the same, a sentence each.
        file: The JSON file, as shown to the user.
    """

    yaml: str
    notes: tuple[str, ...]
    file: str

    def load(self, overrides: Sequence[str] = ()) -> Batch:
        """The checked batch; problems name lines of the YAML, which `--convert` prints.

        Raises:
            SpecError: See `batch.load_batch`.
        """
        data, places, found = parse(self.yaml, f"{self.file} (as YAML)")
        return batch_of(data, places, overrides, found, folder=Path(self.file))


def convert_batch(file: str | Path, *, drop: Sequence[str] = ()) -> Converted:
    """The batch file that means what a JSON batch of the TALT project means.

    Args:
        file: Its path.
        drop: Fields to leave out, of those that would be refused.

    Raises:
        SpecError: Not such a file, or a field that cannot be mapped; all of them, with their lines.
    """
    path = loading.find(file, search_path=())
    shown = str(file)
    text = read(path, shown)
    try:
        json.loads(text)
    except ValueError as error:
        line, column = getattr(error, "lineno", 0), getattr(error, "colno", 0)
        message = f"is not JSON: {getattr(error, 'msg', error)}"
        raise SpecError([Problem(message, "", shown, line, column)]) from error
    data, places, found = parse(text, shown)  # JSON is YAML: this way every field has its line
    if not isinstance(data, dict) or not isinstance(data.get("experiments"), list):
        text = "is no batch of the TALT project: it needs a list 'experiments'"
        raise SpecError([*found, Problem(text, file=shown)])
    dropped = {_dashed(name) for name in drop}
    strange = sorted(dropped - _KNOWN)
    found += [Problem(unknown("field", name, _KNOWN), file="--drop") for name in strange]
    for key in data:
        if key not in ("experiments", "name", "description"):
            text = unknown("key", key, ["experiments", "name", "description"])
            found.append(places.problem((key,), text, key=True))
    notes: dict[str, None] = {}
    runs: dict[str, Any] = {}
    for number, experiment in enumerate(data["experiments"]):
        at = ("experiments", number)
        if not isinstance(experiment, dict):
            text = f"must be a mapping of options, not {wording.shown(experiment)}"
            found.append(places.problem(at, text))
            continue
        name = _name(str(experiment.get("name", f"run-{number + 1}")))
        if name.lower() in {other.lower() for other in runs}:
            name = f"{name[:44]}-{number + 1}"
        runs[name] = _run(experiment, places, at, dropped, found, notes)
    if not runs and not found:
        found.append(places.problem(("experiments",), "is empty"))
    if found:
        raise SpecError(ordered(found))
    content = {
        "version": 1,
        "name": _name(str(data.get("name", path.stem))),
        **({"title": str(data["description"])[:200]} if data.get("description") else {}),
        "defaults": {"dataset": {"validation_fraction": 0.1}},
        "runs": runs,
    }
    return Converted(_yaml(content, shown), tuple(notes), shown)


def _run(
    experiment: Mapping[str, Any],
    places: Source,
    at: tuple[str | int, ...],
    dropped: set[str],
    found: list[Problem],
    notes: dict[str, None],
) -> dict[str, Any]:
    """One experiment as a run; what is wrong goes to `found`, what is worth a word to `notes`."""
    run: dict[str, Any] = {"dataset": {}, "model": {}, "training": {}, "parameters": {}}
    given = {_dashed(key): (key, value) for key, value in experiment.items()}
    for field in ("architecture", "dataset", "optimizer"):
        if field not in given:
            found.append(places.problem(at, f"missing field '{field}'", key=True))
    talt = str(given.get("optimizer", ("", ""))[1]) in ("talt", "improved-talt")
    for field, (key, value) in given.items():
        path = (*at, key)
        if field in dropped:
            notes[f"{field} was left out as you asked"] = None
        elif field == "name":
            continue
        elif field in ("architecture", "dataset", "optimizer"):
            fault = _named(field, value, run, notes)
            if fault:
                found.append(places.problem(path, fault))
        elif field == "epochs":
            run["training"]["epochs"] = value
        elif field == "seed":
            run["seeds"] = [value]
        elif field == "mixed-precision":
            if value:
                run["training"]["precision"] = "fp16"
        elif field in HYPERPARAMETERS:
            if field in TALT_ONLY and not talt:
                notes[f"{field} was left out where the optimizer is not TALT; it had no effect"] = (
                    None
                )
            else:
                run["parameters"][HYPERPARAMETERS[field]] = value
        elif field in LEFT_OUT:
            notes[f"{field} was left out: {LEFT_OUT[field]}"] = None
        elif field in REFUSED:
            if value is False or (not talt and field not in ("tune-hyperparams", "resume-from")):
                continue  # it asked for nothing
            text = f"'{key}' has no counterpart: {REFUSED[field]} (--drop {field} leaves it out)"
            found.append(places.problem(path, text, key=True))
        else:
            found.append(places.problem(path, unknown("field", key, _KNOWN), key=True))
    return {key: value for key, value in run.items() if value}


def _named(field: str, value: Any, run: dict[str, Any], notes: dict[str, None]) -> str | None:
    """Puts the name of a network, dataset or optimizer into `run`; why it cannot, if so."""
    known = {"architecture": ARCHITECTURES, "dataset": DATASETS, "optimizer": OPTIMIZERS}[field]
    if value in NO_COUNTERPART[field]:
        return f"'{value}' has no counterpart: {NO_COUNTERPART[field][value]}"
    if value not in known:
        return unknown(field, value, [*known, *NO_COUNTERPART[field]])
    if field == "optimizer":
        run["parameters"]["optimizer"] = known[value]
        if known[value] == "talt":
            notes["TALT here is a new derivation: its settings need tuning of their own"] = None
    elif field == "dataset":
        run["dataset"]["name"] = known[value]
    else:
        run["model"]["name"] = known[value]
        if value == "simplecnn":
            notes["simplecnn becomes convnet, the nearest network here and not the same"] = None
    return None


def _dashed(name: str) -> str:
    return name.strip().lstrip("-").replace("_", "-")


def _name(text: str) -> str:
    """`text` as the name of a run."""
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_")[:48]
    return cleaned if re.fullmatch(NAME, cleaned) else f"run-{cleaned}"[:48].strip("-")


def _yaml(content: Mapping[str, Any], file: str) -> str:
    out = io.StringIO()
    out.write(f"# Converted from {Path(file).name}, a batch of the TALT project.\n")
    yaml = YAML()
    yaml.width = 10_000
    yaml.default_flow_style = False
    yaml.dump(dict(content), out)
    return out.getvalue()
