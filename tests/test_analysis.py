"""What `llp landscape` computes is right, is kept, and is made again exactly where it must be."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analysis_runs import (
    KillAfter,
    KilledError,
    mean_loss,
    moved,
    run,
    settings,
    subject_of,
)

from llp import landscape, registry
from llp.analyses import results, store
from llp.analyses.store import PartStore, Stored
from llp.analyses.subject import Finding
from llp.analysis import Outcome
from llp.errors import NoTrialSucceeded, StudyError
from llp.landscape import directions as makers
from llp.landscape import keys
from llp.reporting.landscape_page import read_results
from llp.tracking.lock import FileLock
from llp.training.checkpoint import load as load_checkpoint

TRAIN = {"train": True, "num_runs": 2}
EVERYTHING = [*registry.ANALYSES]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Every analysis of one training, with the plane's robust loss and a connecting curve."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = run(
        folder,
        f"analyses={json.dumps(EVERYTHING)}",
        source=TRAIN,
        surfaces={
            "resolution": 5,
            "robust": ["random"],
            "directions": ["random", "hessian", "hessian_signed", "trajectory", "random_base"],
        },
        jacobian={"side": 4},
    )
    return folder, outcome


@pytest.fixture
def copied(whole: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A folder in which everything is done."""
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    return folder


def arrays_of(folder: Path) -> dict[str, Any]:
    return read_results(folder)[1]


def values_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = read_results(folder)[0]["values"]
    return values


def looked_at(folder: Path, **sections: Any) -> Any:
    """The subject of the results in a folder."""
    return subject_of(settings(folder, source=TRAIN, **sections), folder)


def test_every_analysis_of_the_table_is_made(whole: tuple[Path, Outcome]) -> None:
    folder, outcome = whole
    assert outcome.missing == {}
    plain, _ = read_results(folder)
    assert {part["analysis"] for part in plain["parts"].values()} == set(EVERYTHING)
    for name in ("surface/random_base", "line/from_start", "connectivity", "jacobian/output"):
        assert name in outcome.computed


def test_the_centre_of_every_surface_and_line_is_the_base_loss_to_the_bit(
    whole: tuple[Path, Outcome],
) -> None:
    arrays, values = arrays_of(whole[0]), values_of(whole[0])
    checked = 0
    for key in values:
        name, _, field = key.rpartition("/")
        if field != "base_loss" or not name.startswith(("surface/", "line/")):
            continue
        place = np.flatnonzero(arrays[f"{name}/x"] == 0.0)
        found = arrays[f"{name}/loss"][place]
        if name.startswith("surface/"):
            found = found[:, arrays[f"{name}/y"] == 0.0]
        if name == "surface/trajectory":
            continue  # its grid does not hold the model itself
        assert found.size == 1
        assert float(found.item()) == values[key], name
        checked += 1
    assert checked >= 5
    base = {values[f"surface/{kind}/base_loss"] for kind in ("random", "hessian", "trajectory")}
    assert len(base) == 1


@pytest.mark.parametrize("kind", ["random", "hessian", "trajectory"])
def test_a_surface_is_the_loss_of_weights_moved_by_hand(
    whole: tuple[Path, Outcome], kind: str
) -> None:
    folder, _ = whole
    subject, arrays = looked_at(folder), arrays_of(folder)
    if kind == "random":
        rows = makers.random(subject.model, 2, seed=0).vectors
    elif kind == "hessian":
        op = landscape.hessian(subject.model, subject.loss_fn, subject.batches)
        rows = landscape.top_eigenpairs(op, 2, tolerance=1e-6, accuracy="vectors").vectors.T
    else:
        weights = [subject.read(each) for each in subject.path]
        rows = landscape.pca_directions(subject.model, weights).vectors
    x, y = arrays[f"surface/{kind}/x"], arrays[f"surface/{kind}/y"]
    loss, accuracy = arrays[f"surface/{kind}/loss"], arrays[f"surface/{kind}/metric"]
    signs = (1, -1) if kind == "hessian" else (1,)  # an eigenvector has no sign
    errors = []
    for first in signs:
        for second in signs:
            expected = [
                [
                    mean_loss(
                        moved(subject.model, (first * a, rows[0]), (second * b, rows[1])),
                        subject.batches,
                    )
                    for b in (y[0], y[-2])
                ]
                for a in (x[1], x[-1])
            ]
            found = loss[np.ix_([1, -1], [0, -2])]
            errors.append(np.abs(found - np.asarray(expected)[..., 0]).max() / found.max())
            if errors[-1] < 1e-3:
                shares = accuracy[np.ix_([1, -1], [0, -2])]
                np.testing.assert_allclose(shares, np.asarray(expected)[..., 1], atol=0.02)
    assert min(errors) < 1e-3


def test_the_robust_loss_is_never_below_the_plain_one(whole: tuple[Path, Outcome]) -> None:
    arrays = arrays_of(whole[0])
    assert (arrays["surface/random/robust"] >= arrays["surface/random/loss"]).all()
    assert (arrays["surface/random/robust"] > arrays["surface/random/loss"]).any()
    assert "surface/hessian/robust" not in arrays


def test_sharpness_is_that_of_the_library_on_the_same_examples(
    whole: tuple[Path, Outcome],
) -> None:
    subject, values = looked_at(whole[0]), values_of(whole[0])
    found = landscape.sharpness.sam(subject.model, subject.loss_fn, subject.batches, rho=0.05)
    assert values["sharpness/sam"] == found.value
    assert values["sharpness/sam/standard_error"] == found.standard_error
    assert found.standard_error > 0  # over batches, of which there are enough


def test_the_spectrum_is_that_of_the_dense_hessian(whole: tuple[Path, Outcome]) -> None:
    subject = looked_at(whole[0])
    values, arrays = values_of(whole[0]), arrays_of(whole[0])
    op = landscape.hessian(subject.model, subject.loss_fn, subject.batches)
    dense = (op @ torch.eye(op.shape[0])).double()
    expected = torch.linalg.eigvalsh((dense + dense.T) / 2).numpy()
    assert values["spectrum/largest"] == pytest.approx(expected[-1], rel=1e-2)
    assert values["spectrum/smallest"] == pytest.approx(expected[0], rel=0.1)
    error = values["spectrum/trace_standard_error"]
    assert values["spectrum/trace"] == pytest.approx(expected.sum(), abs=4 * error)
    assert error < 0.5 * abs(expected.sum())
    for value, residual in zip(
        arrays["spectrum/ends"], arrays["spectrum/ends_residuals"], strict=True
    ):
        assert np.abs(expected - value).min() <= residual + 1e-4
    grid, density = arrays["spectrum/density_grid"], arrays["spectrum/density"]
    assert np.trapezoid(density, grid) == pytest.approx(1.0, abs=0.02)
    assert (density >= 0).all()
    assert values["spectrum/re"] == pytest.approx(abs(expected[0] / expected[-1]), rel=0.2)


def test_trajectory_ends_at_the_model_and_begins_before_the_first_step(
    whole: tuple[Path, Outcome],
) -> None:
    folder, _ = whole
    arrays, subject = arrays_of(folder), looked_at(folder)
    assert arrays["trajectory/epoch"].tolist() == [0, 1, 2, 3]
    assert arrays["trajectory/coordinates"][-1].tolist() == [0.0, 0.0]
    for index, weights in enumerate(subject.path):
        twin = copy.deepcopy(subject.model)
        twin.load_state_dict(subject.read(weights))
        loss, _ = mean_loss(twin, subject.batches)
        assert arrays["trajectory/loss"][index] == pytest.approx(loss, rel=1e-5)
    first = subject.fresh(0)
    fresh = copy.deepcopy(subject.model)
    fresh.load_state_dict(subject.read(subject.path[0]))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), fresh.parameters(), strict=True)
    )


def test_the_two_runs_are_independent_and_joined_by_a_lower_curve(
    whole: tuple[Path, Outcome],
) -> None:
    folder, _ = whole
    subject, values, arrays = looked_at(folder), values_of(folder), arrays_of(folder)
    other = copy.deepcopy(subject.model)
    other.load_state_dict(subject.read(subject.other))
    ends = [mean_loss(model, subject.batches)[0] for model in (subject.model, other)]
    for kind in ("linear", "curve"):
        loss = arrays[f"connectivity/{kind}/loss"]
        np.testing.assert_allclose(loss[[0, -1]], ends, rtol=1e-5)
    assert values["connectivity/linear/barrier"] > values["connectivity/curve/barrier"]
    assert values["connectivity/curve/length"] >= values["connectivity/curve/chord"]


def test_measured_are_fixed_unaugmented_training_examples_in_eval_mode(tmp_path: Path) -> None:
    spec = settings(
        tmp_path,
        "experiment.training.augmentation=[flip, crop]",
        "experiment.model.options.dropout=0.5",
        source=TRAIN,
    )
    first, second = subject_of(spec, tmp_path), subject_of(spec, tmp_path)
    assert not any(module.training for module in first.model.modules())
    assert len(first.batches) >= 8
    for (a, b), (c, d) in zip(first.batches, second.batches, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    other = subject_of(settings(tmp_path, "data.split=validation", source=TRAIN), tmp_path)
    assert other.digest() != first.digest()
    assert not torch.equal(other.batches[0][0], first.batches[0][0])


# What is kept


def test_a_repeated_run_computes_nothing_and_gives_the_same(copied: Path) -> None:
    before = (copied / "landscape.npz").read_bytes()
    outcome = again(copied)
    assert outcome.computed == ()
    assert (copied / "landscape.npz").read_bytes() == before


def again(folder: Path, *overrides: str, on_event: Any = None, **sections: Any) -> Outcome:
    """Another run in a folder in which the same was done before."""
    surfaces = {
        "resolution": 5,
        "robust": ["random"],
        "directions": ["random", "hessian", "hessian_signed", "trajectory", "random_base"],
        **sections.pop("surfaces", {}),
    }
    return run(
        folder,
        f"analyses={json.dumps(EVERYTHING)}",
        *overrides,
        on_event=on_event,
        source=TRAIN,
        surfaces=surfaces,
        jacobian={"side": 4},
        **sections,
    )


@pytest.mark.parametrize(
    ("override", "redone"),
    [
        (
            "surfaces.resolution=6",
            {
                f"surface/{k}"
                for k in ["random", "hessian", "hessian_signed", "trajectory", "random_base"]
            },
        ),
        ("surfaces.rho=0.1", {"surface/random"}),
        ("surfaces.hessian_extent=0.5", {"surface/hessian", "surface/hessian_signed"}),
        (
            "directions.normalization=layer",
            {"surface/random", "surface/random_base", "line/random"},
        ),
        (
            "spectrum.tolerance=1e-2",
            {"spectrum", "surface/hessian", "surface/hessian_signed", "line/hessian"},
        ),
        ("sharpness.measures=[{name: sam, rho: 0.1}, noise]", {"sharpness/sam"}),
        ("smoothness.steps=[1e-2]", {"smoothness"}),
        ("ranks.spatial=mean", {"ranks", "rank_dynamics/effective"}),
        ("ranks.measure=stable", {"rank_dynamics/stable"}),
        ("connectivity.num_bends=2", {"connectivity"}),
        ("jacobian.side=3", {"jacobian/output"}),
        ("surfaces.loss_cap=3", set()),
        ("output.pictures=[svg]", set()),
        ("workers.cpus_per_worker=2", set()),
    ],
)
def test_a_changed_setting_redoes_exactly_what_it_affects(
    copied: Path, override: str, redone: set[str]
) -> None:
    assert set(again(copied, override).computed) == redone


def test_other_examples_redo_everything(copied: Path) -> None:
    outcome = again(copied, "data.num_examples=50")
    assert outcome.kept == ()


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    chosen = ["analyses=[sharpness, surfaces]", "surfaces.directions=[random, random_base]"]
    killer = KillAfter(1, event="part", part="surface/random_base", status="start")
    with pytest.raises(KilledError):
        run(tmp_path, *chosen, on_event=killer, source={"train": True})
    outcome = run(tmp_path, *chosen, source={"train": True})
    assert outcome.kept == ("sharpness/sam", "sharpness/noise", "surface/random")
    assert outcome.computed == ("surface/random_base",)


def test_a_surface_that_is_killed_halfway_computes_only_its_missing_points(tmp_path: Path) -> None:
    chosen = ["analyses=[surfaces]", "surfaces.directions=[random]", "surfaces.resolution=9"]
    whole = run(tmp_path / "whole", *chosen, source={"train": True})
    killer = KillAfter(1, event="progress", part="surface/random", done=48)
    with pytest.raises(KilledError):
        run(tmp_path / "cut", *chosen, on_event=killer, source={"train": True})
    seen: list[Any] = []
    outcome = run(tmp_path / "cut", *chosen, on_event=seen.append, source={"train": True})
    points = [event["total"] for event in seen if event["event"] == "progress"]
    assert points[0] == 81 - 32  # what was told as done only after it was stored, less one chunk
    assert outcome.values == {**outcome.values, **_without_times(whole.values)}
    np.testing.assert_array_equal(
        arrays_of(tmp_path / "cut")["surface/random/loss"],
        arrays_of(tmp_path / "whole")["surface/random/loss"],
    )
    assert not list((tmp_path / "cut" / "parts").glob("*.chunks"))


def _without_times(values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.endswith("seconds")}


def test_a_training_that_is_killed_is_not_begun_again(tmp_path: Path) -> None:
    killer = KillAfter(1, event="training", run=1, status="start")
    with pytest.raises(KilledError):
        run(tmp_path, "analyses=[sharpness]", on_event=killer, source=TRAIN)
    stamp = os.stat(tmp_path / "training" / "checkpoints" / "run-0.pt").st_mtime_ns
    seen: list[Any] = []
    run(tmp_path, "analyses=[sharpness]", on_event=seen.append, source=TRAIN)
    told = [(e["run"], e["status"]) for e in seen if e["event"] == "training"]
    assert told[0] == (0, "kept")
    assert told[1] == (1, "start")
    assert os.stat(tmp_path / "training" / "checkpoints" / "run-0.pt").st_mtime_ns == stamp


def test_another_recipe_trains_again_and_leaves_no_old_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, "analyses=[sharpness]", source={"train": True})
    outcome = run(
        tmp_path,
        "analyses=[sharpness, trajectory]",
        "experiment.training.epochs=2",
        source={"train": True},
    )
    assert "sharpness/sam" in outcome.computed
    assert arrays_of(tmp_path)["trajectory/epoch"].tolist() == [0, 1, 2]
    weights = sorted(path.name for path in (tmp_path / "training" / "checkpoints").iterdir())
    assert weights == ["run-0-e000.pt", "run-0-e001.pt", "run-0-e002.pt", "run-0.pt"]
    last = load_checkpoint(tmp_path / "training" / "checkpoints" / "run-0-e002.pt")
    final = load_checkpoint(tmp_path / "training" / "checkpoints" / "run-0.pt")
    assert all(torch.equal(last["model"][k], final["model"][k]) for k in final["model"])


def test_a_damaged_finding_is_computed_again(copied: Path) -> None:
    path = copied / "parts" / "surface-random.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    (copied / "parts" / "sharpness-sam.json").write_text("{")
    assert set(again(copied).computed) == {"surface/random", "sharpness/sam"}


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    lock = FileLock.acquire(tmp_path / "lock", busy="")
    try:
        with pytest.raises(StudyError, match=f"process {os.getpid()}"):
            run(tmp_path, source=TRAIN)
    finally:
        lock.release()


# What cannot be made


def test_a_part_that_fails_is_named_and_keeps_no_other_from_being_made(tmp_path: Path) -> None:
    outcome = run(
        tmp_path,
        "analyses=[sharpness, jacobian]",
        "sharpness.measures=[sam, {name: relative_flatness, layer: nope}]",
        "jacobian.layers=[nope]",
        source={"train": True},
    )
    assert outcome.computed == ("sharpness/sam",)
    assert "no linear layer is called 'nope'" in outcome.missing["sharpness/relative_flatness"]
    assert "no module is called 'nope'" in outcome.missing["jacobian/nope"]
    assert read_results(tmp_path)[0]["missing"] == outcome.missing


def test_what_the_source_has_nothing_for_is_left_out_with_its_reason(tmp_path: Path) -> None:
    outcome = run(tmp_path, "surfaces.directions=[random, adam]", source={"train": True})
    assert set(outcome.missing) == {"connectivity", "surface/adam"}
    assert "two verified seeds" in outcome.missing["connectivity"]
    assert "keeps no exp_avg" in outcome.missing["surface/adam"]  # it was trained by SGD


def test_adam_moments_span_a_plane_where_the_optimizer_keeps_them(tmp_path: Path) -> None:
    outcome = run(
        tmp_path,
        "analyses=[surfaces, lines]",
        "surfaces.directions=[adam]",
        "lines.directions=[adam]",
        "experiment.training.optimizer=adam",
        "experiment.training.learning_rate=0.01",
        source={"train": True},
    )
    assert outcome.missing == {}
    values, arrays = outcome.values, arrays_of(tmp_path)
    assert values["surface/adam/label_1"] == "exp_avg"
    assert values["surface/adam/norm_1"] == pytest.approx(1.0, abs=1e-5)
    assert arrays["line/adam/loss"].shape == (5,)


def test_nothing_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NoTrialSucceeded, match="no part of the landscape could be made"):
        run(
            tmp_path,
            "analyses=[jacobian]",
            "jacobian.layers=[nope]",
            source={"train": True},
        )


# Keys


def test_every_key_of_a_record_is_described(whole: tuple[Path, Outcome]) -> None:
    plain, arrays = read_results(whole[0])
    for key in [*arrays, *plain["values"]]:
        section, _, rest = key.partition("/")
        field = re.sub(r"_\d+$", "", rest.rpartition("/")[2])
        if key in plain["parts"]:
            field = "value"  # a measure's own value
        about = plain["about"][section]
        told = about.get(field) or about.get(field.removesuffix("_standard_error"), "")
        assert len(told) > 5, key


def test_older_names_point_to_the_same_values(whole: tuple[Path, Outcome]) -> None:
    plain, arrays = read_results(whole[0])
    aliases = plain["aliases"]
    known = {**plain["values"], **arrays}
    assert set(aliases.values()) <= set(known)
    for older, key in (
        ("plane_random_dirs", "surface/random/loss"),
        ("plane_hessian_signed", "surface/hessian_signed/loss"),
        ("sam_surface", "surface/random/robust"),
        ("hessian_trace_estimate", "spectrum/trace"),
        ("hesd_re", "spectrum/re"),
        ("hessian_top_eig_1", "spectrum/eigenvalue_1"),
        ("interp_1d", "line/random/loss"),
        ("mode_curve", "connectivity/curve/loss"),
        ("1_effective_rank", "ranks/1/effective"),
        ("effective_rank_drop_gini", "rank_dynamics/effective/drop_gini"),
    ):
        assert aliases[older] == key
    for key in known:
        for older in keys.aliases_of(key):
            assert aliases[older] == key


def test_numbers_that_json_cannot_hold_come_back(tmp_path: Path) -> None:
    kept = PartStore(tmp_path)
    numbers = {"a": float("nan"), "b": float("-inf"), "c": 1.5, "d": None, "e": "text", "": 2}
    rows = [{"name": "x", "value": float("inf")}, {"name": "y", "value": 1.0}]
    finding = Finding(numbers, {"array": np.arange(3.0)}, rows, {"v": np.ones((2, 3))})
    kept.save(Stored("a/b", "surfaces", "d" * 64, finding, {"x": 1}, 1.5, "cpu"))
    assert kept.load("a/b", "e" * 64) is None
    back = kept.load("a/b", "d" * 64)
    assert back is not None
    assert str(back.finding.numbers) == str(numbers)
    assert str(back.finding.rows) == str(rows)
    np.testing.assert_array_equal(back.finding.arrays["array"], np.arange(3.0))
    assert back.finding.vectors["v"].shape == (2, 3)
    plain, arrays = results.content([back], subject={}, settings={}, missing={}, environment={})
    assert plain["values"]["a/b"] == 2
    assert plain["values"]["a/b/y/value"] == 1.0
    assert list(arrays) == ["a/b/array"]  # vectors as long as the weights stay in the part


def test_digest_of_a_part_depends_on_all_that_determines_it() -> None:
    base = store.digest_of("s", {"a": 1}, {"spectrum": "x"})
    assert base == store.digest_of("s", {"a": 1}, {"spectrum": "x"})
    others = [
        store.digest_of("t", {"a": 1}, {"spectrum": "x"}),
        store.digest_of("s", {"a": 2}, {"spectrum": "x"}),
        store.digest_of("s", {"a": 1}, {"spectrum": "y"}),
    ]
    assert len({base, *others}) == 4
