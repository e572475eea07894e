"""What passes the checks can be trained: every draw of a checked space makes a recipe."""

from __future__ import annotations

import pytest

from llp.spec import RandomSearch, Spec, load_spec
from llp.spec.loading import names
from llp.training.recipe import Recipe

EVERYTHING = {
    "name": "everything",
    "dataset": {"name": "digits"},
    "model": {"name": "mlp"},
    "training": {"optimizer_options": {"nesterov": True}},
    "search_space": {
        "model": ["mlp", "convnet"],
        "depth": {"type": "integer", "low": 1, "high": 3, "when": {"model": "mlp"}},
        "width": [8, 16],
        "dropout": {"type": "uniform", "low": 0, "high": 0.5},
        "optimizer": ["sgd", "adam", "adamw"],
        "learning_rate": {"type": "loguniform", "low": "1e-4", "high": 1},
        "weight_decay": [0, 1e-4],
        "momentum": {"type": "uniform", "low": 0.1, "high": 0.9, "when": {"optimizer": "sgd"}},
        "beta1": {
            "type": "uniform",
            "low": 0.8,
            "high": 0.9,
            "when": {"optimizer": ["adam", "adamw"]},
        },
        "schedule": ["cosine", "one_cycle", "step", "constant"],
        "warmup_fraction": {
            "type": "uniform",
            "low": 0,
            "high": 0.2,
            "when": {"schedule": ["cosine", "step", "constant"]},
        },
        "batch_size": {"type": "integer", "low": 16, "high": 256, "log": True},
        "label_smoothing": [0.0, 0.1],
        "gradient_clip": ["none", 1.0],
        "augmentation": ["none", "flip", "flip+crop"],
    },
    "constraints": [
        "optimizer == 'sgd' or learning_rate < 0.01",
        "learning_rate / batch_size < 0.02",
    ],
}


def drawn(spec: Spec, count: int) -> list[Recipe]:
    search = RandomSearch(spec.search_space, spec.constraints, spec.seed)
    return [Recipe.of(spec, search.suggest(index)) for index in range(count)]


@pytest.mark.parametrize("name", sorted(names()))
def test_every_draw_of_a_shipped_space_is_a_recipe(name: str) -> None:
    spec = load_spec(name)
    recipes = drawn(spec, 10)
    if "learning_rate" in spec.search_space:
        assert len({recipe.learning_rate for recipe in recipes}) == 10
    assert {recipe.schedule for recipe in recipes} == {spec.training.schedule}


def test_every_draw_of_everything_that_can_be_searched_is_a_recipe() -> None:
    recipes = drawn(load_spec(EVERYTHING), 30)
    assert {recipe.optimizer for recipe in recipes} == {"sgd", "adam", "adamw"}
    assert {recipe.model for recipe in recipes} == {"mlp", "convnet"}
    assert {recipe.gradient_clip for recipe in recipes} == {None, 1.0}
    assert {recipe.augmentation for recipe in recipes} == {(), ("flip",), ("flip", "crop")}
    assert all(("momentum" in r.optimizer_options) == (r.optimizer == "sgd") for r in recipes)
    assert all(("nesterov" in r.optimizer_options) == (r.optimizer == "sgd") for r in recipes)
    assert all(("depth" in r.model_options) == (r.model == "mlp") for r in recipes)
