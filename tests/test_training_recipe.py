"""A hyperparameter is read in exactly one place, or it is an error."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from llp import registry
from llp.errors import SpecError
from llp.spec.schema import Spec
from llp.training.recipe import Recipe


def spec(**sections: Any) -> Spec:
    return Spec.model_validate(
        {
            "name": "test",
            "dataset": {"name": "digits"},
            "model": {"name": "mlp"},
            "search_space": {"learning_rate": 0.1},
            **sections,
        }
    )


def test_without_hyperparameters_it_is_the_file() -> None:
    training = {"learning_rate": 0.3, "augmentation": ["flip"], "gradient_clip": 1.0}
    recipe = Recipe.of(spec(training=training), {})
    assert (recipe.learning_rate, recipe.augmentation, recipe.gradient_clip) == (0.3, ("flip",), 1)
    assert recipe.optimizer_options == {}
    assert recipe.model_options == {}


def test_each_kind_of_hyperparameter_reaches_its_place() -> None:
    recipe = Recipe.of(
        spec(), {"learning_rate": 0.5, "batch_size": 64.0, "momentum": 0.8, "width": 32}
    )
    assert recipe.learning_rate == 0.5
    assert recipe.batch_size == 64
    assert isinstance(recipe.batch_size, int)
    assert recipe.optimizer_options == {"momentum": 0.8}
    assert recipe.model_options == {"width": 32}


@pytest.mark.parametrize(
    ("text", "names"),
    [("none", ()), ("flip", ("flip",)), ("flip+crop", ("flip", "crop")), ("", ())],
)
def test_augmentation_may_be_searched_as_text(text: str, names: tuple[str, ...]) -> None:
    assert Recipe.of(spec(), {"augmentation": text}).augmentation == names


def test_gradient_clip_may_be_searched_with_none() -> None:
    file = spec(training={"gradient_clip": 1.0})
    assert Recipe.of(file, {"gradient_clip": "none"}).gradient_clip is None
    assert Recipe.of(file, {"gradient_clip": 2}).gradient_clip == 2.0


def test_an_inactive_parameter_leaves_the_default() -> None:
    file = spec(
        training={"optimizer_options": {"momentum": 0.7}},
        search_space={
            "optimizer": ["sgd", "adamw"],
            "momentum": {"type": "uniform", "low": 0, "high": 0.9, "when": {"optimizer": "sgd"}},
        },
    )
    assert Recipe.of(file, {"optimizer": "adamw"}).optimizer_options == {}
    assert Recipe.of(file, {"optimizer": "sgd"}).optimizer_options == {"momentum": 0.7}
    chosen = Recipe.of(file, {"optimizer": "sgd", "momentum": 0.2})
    assert chosen.optimizer_options == {"momentum": 0.2}


def test_model_may_be_searched_and_takes_only_its_own_options() -> None:
    file = spec(
        model={"name": "mlp", "options": {"depth": 3}},
        search_space={"model": ["mlp", "convnet"]},
    )
    assert Recipe.of(file, {"model": "mlp"}).model_options == {"depth": 3}
    assert Recipe.of(file, {"model": "convnet", "width": 8}).model_options == {"width": 8}


@pytest.mark.parametrize(
    ("sections", "hyperparameters", "words"),
    [
        ({}, {"lr": 0.1}, "search_space.lr: nothing reads 'lr'"),
        ({}, {"learning_rat": 0.1}, "did you mean 'learning_rate'"),
        ({}, {"epochs": 3}, "the rungs fix the epochs"),
        ({"training": {"optimizer": "adamw"}}, {"momentum": 0.9}, "belongs to optimizer sgd"),
        (
            {"search_space": {"optimizer": ["sgd", "adamw"]}},
            {"optimizer": "adamw", "momentum": 0.9},
            "an option of optimizer sgd, not of adamw; add `when: {optimizer: sgd}`",
        ),
        (
            {"training": {"schedule": "one_cycle"}},
            {"warmup_fraction": 0.1},
            "schedule one_cycle has a rise of its own",
        ),
        ({}, {"learning_rate": -1}, "training.learning_rate: Input should be greater than 0"),
        ({}, {"batch_size": 32.5}, "training.batch_size"),
        ({}, {"augmentation": "flip+crp"}, "did you mean 'crop'"),
        ({}, {"schedule": "cosin"}, "did you mean 'cosine'"),
        ({}, {"optimizer": "adm"}, "did you mean 'adam'"),
        ({}, {"model": "mpl"}, "did you mean 'mlp'"),
        (
            {"training": {"optimizer_options": {"beta1": 0.9}}},
            {},
            "training.optimizer_options.beta1: optimizer 'sgd': unknown option 'beta1'",
        ),
        (
            {"model": {"name": "mlp", "options": {"widht": 8}}},
            {},
            "model.options.widht: model 'mlp': unknown option 'widht'; did you mean 'width'",
        ),
    ],
)
def test_what_nothing_reads_is_an_error(
    sections: dict[str, Any], hyperparameters: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError) as caught:
        Recipe.of(spec(**sections), hyperparameters)
    assert words in str(caught.value)


def test_all_unread_hyperparameters_are_named_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        Recipe.of(spec(), {"foo": 1, "bar": 2})
    assert [problem.path for problem in caught.value.problems] == [
        "search_space.foo",
        "search_space.bar",
    ]


@pytest.mark.parametrize("optimizer", sorted(registry.OPTIMIZERS))
def test_every_optimizer_option_can_be_searched(optimizer: str) -> None:
    file = spec(training={"optimizer": optimizer})
    options = registry.options("optimizers", optimizer)
    recipe = Recipe.of(file, options)
    assert recipe.optimizer_options == options
    model = recipe.build_model(channels=1, image_size=8, num_classes=3)
    assert recipe.build_optimizer(model).param_groups[0]["lr"] == file.training.learning_rate


@pytest.mark.parametrize("model", sorted(registry.MODELS))
def test_every_model_option_can_be_searched(model: str) -> None:
    options = registry.options("models", model)
    assert Recipe.of(spec(model={"name": model}), options).model_options == options


def test_it_travels_to_workers() -> None:
    recipe = Recipe.of(spec(), {"momentum": 0.5, "width": 8, "augmentation": "flip"})
    assert pickle.loads(pickle.dumps(recipe)) == recipe
