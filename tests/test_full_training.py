"""A training by itself: what a verification does, resumed to the same bits, validation chooses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llp import full_training
from llp.driver import full_training_seeds
from llp.errors import NoTrialSucceeded, SpecError, StudyError
from llp.full_training import SeedResult, TrainingResult, read_training, train
from llp.records import Job, Rung, Trial, Verification, from_plain, to_plain
from llp.spec import Spec, load_spec
from llp.spec.single import load_training
from llp.tracking.ledger import read_events
from llp.tracking.mlflow_rows import Rows
from llp.tracking.rows import STUDY
from llp.tracking.shipper import tracking_target
from llp.training import checkpoint, loop
from llp.training.full import configuration, run_here, settled
from llp.training.objective import TrainingObjective
from llp.training.recipe import Recipe
from llp.workloads import load as load_data
from llp.workloads.batches import Batches

DATA = {"num_train": 240, "num_test": 120, "num_classes": 4, "image_size": 8}
RUN = {
    "dataset": {"name": "synthetic", "options": DATA},
    "model": {"name": "mlp", "options": {"width": 16, "depth": 1}},
    "training": {"epochs": 4, "batch_size": 32, "learning_rate": 0.1, "optimizer": "sam"},
    "tracking": {"mlflow": False},
}


def run(folder: Path, *overrides: str, source: Any = RUN, **options: Any) -> TrainingResult:
    return train(source, [f"output.root={folder}", *overrides], **options)


def weights(result: TrainingResult, number: int = 0) -> dict[str, torch.Tensor]:
    state = checkpoint.load(Path(result.folder) / result.seeds[number].checkpoint)
    found: dict[str, torch.Tensor] = state["model"]
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def timeless(seed: SeedResult) -> SeedResult:
    curve = tuple(replace(point, seconds=0.0) for point in seed.curve)
    return replace(seed, seconds=0.0, peak_memory_bytes=0, curve=curve)


def test_a_training_is_the_verification_of_a_search_to_the_bit(tmp_path: Path) -> None:
    search = load_spec(
        {
            **RUN,
            "name": "search",
            "training": {"epochs": 4, "batch_size": 32},
            "search_space": {
                "optimizer": ["sam", "sgd"],
                "learning_rate": {"type": "loguniform", "low": 1e-3, "high": 1},
                "rho": {"type": "uniform", "low": 0.01, "high": 0.2, "when": {"optimizer": "sam"}},
            },
        }
    )
    trial = Trial("t003", {"optimizer": "sam", "learning_rate": 0.07, "rho": 0.11}, seed=5)
    data = load_data(search.dataset, search.seed)
    seed = full_training_seeds(search.seed, 1)[0]
    job = Job("t003-v0", "verify", trial, Rung(4, 1.0, len(data.train), 4), seed)
    told: list[Any] = []
    end = run_here(TrainingObjective(search, data, tmp_path / "study", "cpu"), job, told.append)
    assert end.checkpoint is not None
    verified = next(report for report in told if isinstance(report, Verification))

    plain = settled(search, trial.hyperparameters) | {"tracking": {"mlflow": False}}
    result = run(tmp_path, source=plain)

    assert result.seeds[0].test_accuracy == verified.test_accuracy
    assert same(
        weights(result), checkpoint.load_ref(end.checkpoint, root=tmp_path / "study")["model"]
    )


def test_a_killed_training_goes_on_to_the_bits_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ("best_weights=use", "averaging=ema", "num_seeds=2", "augmentation=flip")
    whole = run(tmp_path / "whole", *extra)

    class Killed(BaseException):
        """Stands for kill -9."""

    save, left = checkpoint.save_sealed, [30]

    def dying(path: Any, state: Any) -> None:
        save(path, state)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(checkpoint, "save_sealed", dying)
    with pytest.raises(Killed):
        run(tmp_path / "killed", *extra, snapshot_seconds=0.0)
    interrupted = read_training(tmp_path / "killed" / whole.study_id)
    assert interrupted.status == "interrupted"
    resumed = run(tmp_path / "killed", *extra)

    assert [timeless(seed) for seed in resumed.seeds] == [timeless(seed) for seed in whole.seeds]
    assert all(same(weights(whole, k), weights(resumed, k)) for k in range(2))
    points = [e for e in read_events(Path(resumed.folder)) if e["event"] == "point"]
    assert len(points) == 8  # what the second start repeated was not written again


def test_validation_chooses_the_epoch_and_its_weights_are_tested(tmp_path: Path) -> None:
    # A learning rate that spoils what was learnt: the best epoch is not the last.
    extra = ("schedule=constant", "learning_rate=0.4", "optimizer=sgd", "epochs=6", "seed=0")
    last = run(tmp_path, *extra).seeds[0]
    result = run(tmp_path, *extra, "best_weights=use")
    seed = result.seeds[0]

    accuracies = [point.validation_accuracy for point in seed.curve]
    assert [p.validation_accuracy for p in last.curve] == accuracies  # the same training
    assert seed.best_epoch == 1 + max(
        range(6), key=lambda k: (accuracies[k], -seed.curve[k].validation_loss)
    )
    assert seed.best_epoch < 6
    assert (seed.epoch, last.epoch) == (seed.best_epoch, 6)
    spec = load_training(RUN, [*extra])
    data = load_data(spec.dataset, spec.seed)
    model = Recipe.of(spec, {}).build_model(
        channels=data.channels, image_size=data.image_size, num_classes=data.num_classes
    )
    model.load_state_dict(weights(result))
    assert data.test is not None
    found = {
        name: loop.evaluate(model, Batches(split, batch_size=64, mean=data.mean, std=data.std))
        for name, split in (("validation", data.validation), ("test", data.test))
    }
    assert found["validation"].accuracy == pytest.approx(seed.validation_accuracy)
    assert found["test"].accuracy == pytest.approx(seed.test_accuracy)


def test_best_weights_are_kept_beside_the_last(tmp_path: Path) -> None:
    plain = run(tmp_path)
    kept = run(tmp_path, "best_weights=keep", study_id="kept")
    assert same(weights(plain), weights(kept))
    assert plain.seeds[0].best_checkpoint == ""
    state = checkpoint.load(Path(kept.folder) / kept.seeds[0].best_checkpoint)
    assert state["epoch"] == kept.seeds[0].best_epoch


def test_the_test_split_is_not_read_when_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_training(RUN, [f"output.root={tmp_path}"])
    data = load_data(spec.dataset, spec.seed)
    with_test = run(tmp_path, study_id="with")

    class Untouchable:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"the test split was read: {name}")

        def __len__(self) -> int:
            return 120

    guarded = replace(data, test=Untouchable())  # type: ignore[arg-type]
    result = run(tmp_path, study_id="without", test=False, data=guarded)
    assert result.seeds[0].outcome == "completed"
    assert result.seeds[0].num_test_examples == 0
    assert same(weights(result), weights(with_test))
    with pytest.raises(StudyError, match="without reading the test split"):
        run(tmp_path, study_id="without")


def test_a_finished_training_is_only_read(tmp_path: Path) -> None:
    first = run(tmp_path)
    ledger = (Path(first.folder) / "ledger.jsonl").read_bytes()
    assert run(tmp_path) == first
    assert full_training.resume(Path(first.folder)) == first
    assert (Path(first.folder) / "ledger.jsonl").read_bytes() == ledger
    content = json.loads((Path(first.folder) / "training.json").read_text())
    assert content == to_plain(first)
    assert from_plain(TrainingResult, content) == first


def test_mlflow_gets_one_curve_under_the_same_names_for_every_training(tmp_path: Path) -> None:
    result = run(tmp_path, "num_seeds=2", "mlflow=true", ship=False)
    rows = Rows()
    for event in read_events(Path(result.folder)):
        rows.take(event)
    parent, child = rows.rows[STUDY], rows.rows["t000"]
    assert child.name == parent.name == result.study_id
    assert child.status == parent.status == "FINISHED"
    assert not [name for name in parent.params if name.startswith(("tier", "score", "searcher"))]
    assert (child.params["model"], child.params["optimizer"]) == ("mlp", "sam")
    curve = [row for row in child.metrics if row[0] == "training/validation_accuracy"]
    expected = [point.validation_accuracy for point in result.seeds[0].curve]
    assert [value for _, value, _, _ in curve] == expected
    assert [step for _, _, _, step in curve] == [1, 2, 3, 4]
    final = {name: value for name, value, _, _ in child.metrics}
    assert final["verified/test_accuracy"] == pytest.approx(result.mean()[0])
    spec = load_training(RUN)
    assert tracking_target(Path(result.folder))[1] == full_training.EXPERIMENT
    assert spec.tracking.experiment is None


def test_another_configuration_is_not_taken_for_the_one_that_is_there(tmp_path: Path) -> None:
    run(tmp_path, study_id="mine")
    with pytest.raises(StudyError, match="another spec"):
        run(tmp_path, "learning_rate=0.2", study_id="mine")


def test_a_training_that_diverges_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoTrialSucceeded, match="diverged"):
        run(tmp_path, "learning_rate=1e6", "optimizer=sgd", study_id="bad")
    found = read_training(tmp_path / "bad")
    assert (found.status, found.seeds[0].outcome) == ("failed", "diverged")
    with pytest.raises(NoTrialSucceeded, match="failed before"):
        run(tmp_path, "learning_rate=1e6", "optimizer=sgd", study_id="bad")


@pytest.mark.parametrize("optimizer", ["sgd", "sam", "talt", "entropy_sgd", "adamw"])
def test_the_flat_configuration_is_the_recipe(optimizer: str) -> None:
    extra = [f"optimizer={optimizer}", "averaging=swa", "swa_start=0.5", "gradient_clip=1"]
    spec = load_training(RUN, [*extra, "augmentation=flip+crop", "label_smoothing=0.1"])
    bare = Spec.model_validate(
        {
            "name": "bare",
            "dataset": {"name": "synthetic"},
            "model": {"name": "mlp"},
            "search_space": {"learning_rate": {"type": "fixed", "value": 0.1}},
        }
    )
    assert Recipe.of(spec, configuration(spec)) == Recipe.of(spec, {})
    assert Recipe.of(bare, configuration(spec)) == Recipe.of(spec, {})


# the file


def test_short_names_are_written_where_they_are_read() -> None:
    spec = load_training(
        None,
        [
            "dataset=cifar10",
            "model=wide_resnet",
            "optimizer=talt",
            "smoothing_factor=0.3",
            "depth=28",
            "averaging=ema",
            "ema_decay=0.99",
            "epochs=30",
            "validation_fraction=0.1",
            "seed=7",
            "num_seeds=3",
        ],
    )
    assert spec.training.optimizer_options == {"smoothing_factor": 0.3}
    assert spec.model.options == {"depth": 28}
    assert spec.training.averaging_options == {"ema_decay": 0.99}
    assert (spec.training.epochs, spec.seed, spec.verification.num_seeds) == (30, 7, 3)
    assert spec.dataset.validation_fraction == 0.1
    assert spec.name == "cifar10-wide_resnet-talt"


def test_fixed_values_of_a_search_space_are_the_recipe() -> None:
    space = {"learning_rate": 0.3, "momentum": [0.5], "width": 32, "augmentation": "flip+crop"}
    spec = load_training({**RUN, "training": {}, "search_space": space})
    assert spec.training.learning_rate == 0.3
    assert spec.training.optimizer_options == {"momentum": 0.5}
    assert spec.model.options == {"width": 32, "depth": 1}
    assert spec.training.augmentation == ["flip", "crop"]
    changed = load_training({**RUN, "search_space": space}, ["learning_rate=0.4", "momentum=0.6"])
    assert changed.training.learning_rate == 0.4
    assert changed.training.optimizer_options == {"momentum": 0.6}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["smothing_factor=0.3", "optimizer=talt"], "did you mean 'smoothing_factor'"),
        (["learning_rat=0.3"], "did you mean 'learning_rate'"),
        (["rho=0.1", "optimizer=sgd"], "option of sam, asam, which is not chosen"),
        (["optimizer=talt2"], "did you mean 'talt'"),
        (["tier1.num_trials=3"], "no training reads this"),
        (["noise=0.1", "optimizer=entropy_sgd"], "two of the chosen read 'noise'"),
        (["epochs"], "not of the form key=VALUE"),
        (["optimizer_options.rho=1"], "optimizer_options"),
        (["rho=-1"], "above 0"),
    ],
)
def test_what_nothing_reads_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_training(RUN, overrides)


def test_a_file_that_needs_a_search_is_refused_with_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "dataset: digits\n".replace("digits", "{name: digits}")
        + "model: {name: mlp}\nsearch_space:\n  learning_rate: {type: uniform, low: 0, high: 1}\n"
        + "  batch_size: [32, 64]\ntier1: {num_trials: 4}\n"
    )
    with pytest.raises(SpecError) as caught:
        load_training(file)
    found = [(p.line, p.path) for p in caught.value.problems]
    assert found == [
        (4, "search_space.learning_rate"),
        (5, "search_space.batch_size"),
        (6, "tier1"),
    ]
