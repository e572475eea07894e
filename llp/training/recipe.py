"""What one job trains with: the experiment file's recipe merged with a trial's hyperparameters.

A hyperparameter is spelled as in the experiment file and read in exactly one place: a field of
`training`, `model` (the network's name), or an option of the chosen optimizer, averaging or model.
One that nothing reads is an error. A parameter that is absent (inactive) leaves the
value of the file, or the option's default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from llp import optim, registry
from llp.errors import Problem, SpecError, nearest, unknown
from llp.optim import averaging
from llp.optim.averaging import WeightAverage
from llp.records import HyperparameterValue
from llp.spec.domains import Choice, Fixed
from llp.spec.schema import Spec, TrainingSpec
from llp.workloads import models

_NOT_SEARCHED = {
    "epochs": "the rungs fix the epochs (tier1.epochs, training.epochs)",
    "optimizer_options": "search its entries by name, for example `momentum`",
    "averaging_options": "search its entries by name, for example `ema_decay`",
    "precision": "it cannot be searched; set training.precision",
    "compile": "it cannot be searched; set training.compile",
    "best_weights": "it cannot be searched; set training.best_weights",
    "callbacks": "they watch and change nothing; set training.callbacks",
}
_GIVEN = {"channels", "image_size", "num_classes"}  # arguments that every model is called with
NO_AUGMENTATION = "none"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a network is trained, apart from data, length and seed.

    Attributes are those of `spec.schema.TrainingSpec`, with `model` and the options in full:
    `optimizer_options`, `averaging_options` and `model_options` hold only what was set, by the file
    or the trial.
    """

    model: str
    optimizer: str
    learning_rate: float
    weight_decay: float
    schedule: str
    warmup_fraction: float
    batch_size: int
    label_smoothing: float
    gradient_clip: float | None
    precision: str
    compile: bool
    augmentation: tuple[str, ...] = ()
    model_options: Mapping[str, HyperparameterValue] = field(default_factory=dict)
    optimizer_options: Mapping[str, HyperparameterValue] = field(default_factory=dict)
    averaging: str = "none"
    averaging_options: Mapping[str, HyperparameterValue] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: Spec, hyperparameters: Mapping[str, HyperparameterValue]) -> Recipe:
        """The recipe of `spec` with `hyperparameters` in place of its values.

        `augmentation` may be a string such as `flip+crop`, or `none`; `gradient_clip` may be
        `none`. Options in the file that belong to another searchable optimizer, averaging or model
        are left out; one that belongs to none of them is an error.

        Raises:
            SpecError: A hyperparameter or option nothing reads, or a value out of range. All of
                them at once, each with its dotted path.
        """
        fields = {
            name: _unwrapped(name, value)
            for name, value in hyperparameters.items()
            if name in TrainingSpec.model_fields and name not in _NOT_SEARCHED
        }
        training = _validated({**spec.training.model_dump(), **fields})
        model = str(hyperparameters.get("model", spec.model.name))
        chosen = {"optimizer": training.optimizer, "averaging": training.averaging, "model": model}
        known = {kind: _options(kind, name) for kind, name in chosen.items()}
        options = {
            "optimizer": _applicable(
                spec, "optimizer", training.optimizer, training.optimizer_options
            ),
            "averaging": _applicable(
                spec, "averaging", training.averaging, training.averaging_options
            ),
            "model": _applicable(spec, "model", model, spec.model.options),
        }
        problems = []
        for name, value in hyperparameters.items():
            if name in fields:
                if name == "warmup_fraction" and training.schedule == "one_cycle":
                    problems.append(_unread(name, "schedule one_cycle has a rise of its own"))
                continue
            readers = [kind for kind in chosen if name in known[kind]]
            if len(readers) > 1:
                both = " and of ".join(f"{kind} {chosen[kind]}" for kind in readers)
                problems.append(_unread(name, f"ambiguous: an option of {both}"))
            elif readers:
                options[readers[0]][name] = value
            elif name != "model":
                problems.append(_nobody_reads(name, chosen, spec))
        for kind in training.augmentation:
            if kind not in registry.entries("augmentations") and ":" not in kind:
                text = unknown("augmentation", kind, registry.entries("augmentations"))
                problems.append(Problem(text, path="training.augmentation"))
        if training.schedule not in registry.entries("schedules") and ":" not in training.schedule:
            text = unknown("schedule", training.schedule, registry.entries("schedules"))
            problems.append(Problem(text, path="training.schedule"))
        if problems:
            raise SpecError(problems)
        return cls(
            model=model,
            optimizer=training.optimizer,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            schedule=training.schedule,
            warmup_fraction=training.warmup_fraction,
            batch_size=training.batch_size,
            label_smoothing=training.label_smoothing,
            gradient_clip=training.gradient_clip,
            precision=training.precision,
            compile=training.compile,
            augmentation=tuple(training.augmentation),
            model_options=options["model"],
            optimizer_options=options["optimizer"],
            averaging=training.averaging,
            averaging_options=options["averaging"],
        )

    def build_model(self, *, channels: int, image_size: int, num_classes: int) -> nn.Module:
        """The network, initialised from torch's global generator."""
        return models.build(
            self.model,
            dict(self.model_options),
            channels=channels,
            image_size=image_size,
            num_classes=num_classes,
        )

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer over all parameters of `model`, at the peak learning rate."""
        return optim.build(
            self.optimizer,
            model.parameters(),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            **self.optimizer_options,
        )

    def build_averaging(self, model: nn.Module, *, num_steps: int) -> WeightAverage | None:
        """The average of the weights of `model` over a job of `num_steps` batches."""
        return averaging.build(
            self.averaging, model, num_steps=num_steps, **dict(self.averaging_options)
        )

    def augmentations(self) -> list[Callable[..., Tensor]]:
        """The functions behind `augmentation`, in order."""
        return [registry.load("augmentations", name) for name in self.augmentation]


def model_option_names(model: str) -> set[str]:
    """The options of `model` that a file may set or search."""
    return set(registry.options("models", model)) - _GIVEN


def _unwrapped(name: str, value: HyperparameterValue) -> Any:
    if name == "augmentation" and isinstance(value, str):
        return [] if value in {NO_AUGMENTATION, ""} else [part.strip() for part in value.split("+")]
    return None if name == "gradient_clip" and value == "none" else value


def _validated(values: dict[str, Any]) -> TrainingSpec:
    try:
        return TrainingSpec.model_validate(values)
    except ValidationError as error:
        raise SpecError(
            Problem(
                f"{found['msg']}, not {found['input']!r}",
                path=".".join(["training", *map(str, found["loc"])]),
            )
            for found in error.errors()
        ) from error


def _reachable(spec: Spec, kind: str) -> list[str]:
    """The names that the search may choose for `kind`, that of the file first."""
    named = {
        "optimizer": spec.training.optimizer,
        "averaging": spec.training.averaging,
        "model": spec.model.name,
    }[kind]
    domain = spec.search_space.get(kind)
    if isinstance(domain, Choice):
        return [named, *(str(value) for value in domain.values)]
    return [named, str(domain.value)] if isinstance(domain, Fixed) else [named]


def _options(kind: str, name: str) -> set[str]:
    return model_option_names(name) if kind == "model" else set(registry.options(f"{kind}s", name))


def _applicable(
    spec: Spec, kind: str, chosen: str, options: Mapping[str, HyperparameterValue]
) -> dict[str, HyperparameterValue]:
    """The file's options that the chosen optimizer or model takes."""
    known = _options(kind, chosen)
    where = "model.options" if kind == "model" else f"training.{kind}_options"
    elsewhere = set().union(*(_options(kind, name) for name in _reachable(spec, kind)))
    stray = [name for name in options if name not in known | elsewhere]
    if stray:
        raise SpecError(
            Problem(f"{kind} '{chosen}': {unknown('option', name, known)}", path=f"{where}.{name}")
            for name in stray
        )
    return {name: value for name, value in options.items() if name in known}


def _unread(name: str, why: str) -> Problem:
    return Problem(f"nothing reads '{name}': {why}", path=f"search_space.{name}")


def _nobody_reads(name: str, chosen: Mapping[str, str], spec: Spec) -> Problem:
    if name in _NOT_SEARCHED:
        return _unread(name, _NOT_SEARCHED[name])
    for kind, used in chosen.items():
        readers = [other for other in _reachable(spec, kind) if name in _options(kind, other)]
        if readers:
            return _unread(
                name,
                f"it is an option of {kind} {readers[0]}, not of {used}; "
                f"add `when: {{{kind}: {readers[0]}}}`",
            )
    searchable = set(TrainingSpec.model_fields) - set(_NOT_SEARCHED)
    known = {*searchable, "model"}.union(*(_options(kind, used) for kind, used in chosen.items()))
    owners = [row for row, entry in registry.entries("optimizers").items() if name in entry.options]
    guess = nearest(name, known)
    if owners and not guess:
        return _unread(
            name,
            f"it belongs to optimizer {' or '.join(owners)}, and {chosen['optimizer']} is used",
        )
    hint = f"did you mean '{guess}'?" if guess else f"choose of: {', '.join(sorted(known))}"
    return _unread(name, hint)
