"""The pages of a report matrix: right numbers, nothing dropped, loaded or executed."""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from make_study import HOSTILE, make_events
from matrix_runs import make_entry, make_predictions, predictions_of
from scipy import stats
from sklearn import metrics
from test_reporting_html import EVIL, Page

from llp.reporting import comparison, gallery, matrix, uncertainty
from llp.reporting.figures import calibration, confusion, training
from llp.reporting.index_page import answer, index_document, sureness
from llp.reporting.log_page import log_lines, log_text
from llp.reporting.runs import DOCUMENTS, Entry, file_name, full_trainings
from llp.reporting.study import wilson_interval
from llp.reporting.test_page import brier
from llp.reporting.test_page import test_document as document_of_test
from llp.reporting.training_page import training_document

SAID = make_predictions(700, 7)


# Numbers


def test_class_figures_are_those_of_scikit_learn():
    data = confusion.class_data(SAID)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        SAID.labels, SAID.predicted
    )
    assert data["precision"].tolist() == pytest.approx(precision.tolist())
    assert data["recall"].tolist() == pytest.approx(recall.tolist())
    assert data["f1"].tolist() == pytest.approx(f1.tolist())
    assert data["images"].tolist() == support.tolist()
    expected = metrics.confusion_matrix(SAID.labels, SAID.predicted)
    assert (confusion.confusion_counts(SAID) == expected).all()
    assert data["predicted"].tolist() == expected.sum(axis=0).tolist()


def test_a_class_that_is_never_said_or_never_shown_has_no_share_of_nothing():
    labels, predicted = np.array([0, 0, 1]), np.array([0, 0, 0])
    said = replace(
        make_predictions(3, 3), labels=labels, predicted=predicted, class_names=("a", "b", "c")
    )
    data = confusion.class_data(said).set_index("name")
    assert math.isnan(data.loc["b", "precision"])
    assert math.isnan(data.loc["c", "recall"])
    assert math.isnan(data.loc["c", "f1"])
    assert data.loc["b", "f1"] == 0
    assert "–" in page_of_test(entry_with(said))


def test_top_5_and_brier_are_those_of_scikit_learn_and_of_a_loop():
    said = make_predictions(500, 12, accuracy=0.3)
    expected = metrics.top_k_accuracy_score(said.labels, said.probabilities, k=5)
    assert float((said.rank < 5).mean()) == pytest.approx(expected, abs=0.004)  # float16 ties
    total = 0.0
    for row, label in zip(said.probabilities, said.labels, strict=True):
        total += sum((p - (k == label)) ** 2 for k, p in enumerate(row))
    assert brier(said) == pytest.approx(total / 500)
    text = page_of_test(entry_with(said))
    assert "among the 5 most probable" in text
    assert "among the 5 most probable" not in page_of_test(entry_with(SAID))


def test_the_most_confused_pairs_are_counted_by_hand():
    pairs = confusion.confused_pairs(SAID, 1000)
    counted: dict[tuple[str, str], int] = {}
    for true, predicted in zip(SAID.labels, SAID.predicted, strict=True):
        if true != predicted:
            key = (SAID.name(true), SAID.name(predicted))
            counted[key] = counted.get(key, 0) + 1
    found = {(row["true"], row["predicted"]): row["count"] for row in pairs.to_dict("records")}
    assert found == counted
    assert pairs["count"].is_monotonic_decreasing
    assert pairs["count"].sum() == (~SAID.hits).sum()


def test_the_calibration_error_is_the_sum_over_bins_written_out():
    found = calibration.calibration(SAID, num_bins=10)
    total = 0.0
    for low in range(10):
        inside = [i for i, c in enumerate(SAID.confidence) if low / 10 < c <= (low + 1) / 10]
        if inside:
            gap = SAID.hits[inside].mean() - SAID.confidence[inside].mean()
            total += len(inside) / len(SAID.labels) * abs(gap)
            row = found.bins.iloc[low]
            assert row["images"] == len(inside)
            assert row["gap"] == pytest.approx(gap)
            assert (row["low"], row["high"]) == pytest.approx(
                wilson_interval(float(SAID.hits[inside].mean()), len(inside))
            )
    assert found.error == pytest.approx(total)
    assert found.low < found.high
    assert found.bins["images"].sum() == len(SAID.labels)


def test_calibrated_models_are_called_so_and_an_overconfident_one_not():
    generator = np.random.default_rng(1)
    called = 0
    for _ in range(20):
        confidence = generator.uniform(0.5, 1, 1000)
        honest = replace(predictions_of(generator.random(1000) < confidence), confidence=confidence)
        found = calibration.calibration(honest)
        called += found.error <= found.if_calibrated_high
    assert called >= 16  # 19 of 20 are expected
    proud = replace(honest, confidence=np.minimum(1, confidence + 0.1))
    found = calibration.calibration(proud)
    assert found.error > found.if_calibrated_high
    assert 0.05 < found.overconfidence < 0.15
    assert "points more confident than right" in calibration.calibration_reading(found)


def test_the_expected_error_of_a_calibrated_model_is_that_of_calibrated_models():
    generator = np.random.default_rng(2)
    confidence = generator.uniform(0.3, 1, 500)
    errors = []
    for _ in range(300):
        right = generator.random(500) < confidence
        places = calibration.bins_of(confidence, 15)
        errors.append(calibration.calibration_error(confidence, right.astype(float), places, 15))
    found = calibration.calibration(
        replace(predictions_of(generator.random(500) < confidence), confidence=confidence)
    )
    assert found.if_calibrated == pytest.approx(float(np.mean(errors)), rel=0.05)
    assert found.if_calibrated_high == pytest.approx(float(np.quantile(errors, 0.95)), rel=0.1)


@pytest.mark.parametrize(("share", "num"), [(0.3, 40), (0.0, 25), (1.0, 1000), (0.887, 10_000)])
def test_the_ends_of_a_wilson_interval_are_as_far_from_the_share_as_it_says(share, num):
    for end in wilson_interval(share, num):
        if 0 < end < 1:
            error = math.sqrt(end * (1 - end) / num)
            assert abs(share - end) / error == pytest.approx(1.959964, rel=1e-6)


def test_the_interval_over_seeds_is_students():
    values = [0.90, 0.91, 0.925]
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert uncertainty.seed_interval(values) == pytest.approx(expected)
    assert all(map(math.isnan, uncertainty.seed_interval([0.9])))


def test_the_pooled_spread_is_the_mean_square_within_groups():
    groups = [[0.90, 0.92], [0.80, 0.83, 0.84], [0.7]]
    found = uncertainty.pooled_spread(groups)
    inside = [value - np.mean(group) for group in groups for value in group]
    assert found.degrees == 3
    assert found.variance == pytest.approx(sum(d * d for d in inside) / 3)
    assert uncertainty.pooled_spread([[0.9]]).degrees == 0


def test_a_difference_covers_the_truth_about_as_often_as_it_says():
    """Simulated: 400 images, 3 trainings each, true accuracies 0.7 and 0.72 on infinite data."""
    generator = np.random.default_rng(3)
    inside = 0
    for _ in range(400):
        hard = generator.normal(0, 1, 400)  # shared by both: images are paired
        sides = []
        for shift in (0.7, 0.72):
            level = stats.norm.ppf(shift) * math.sqrt(2)
            runs = generator.normal(0, 0.03, (3, 1)) + level + generator.normal(0, 1, (3, 400))
            sides.append(runs > hard)
        means = [side.mean(axis=1).tolist() for side in sides]
        found = uncertainty.difference(
            *means,
            uncertainty.pooled_spread(means),
            num_images=400,
            hits=(sides[0].mean(axis=0), sides[1].mean(axis=0)),
        )
        inside += found.low <= -0.02 <= found.high
    assert inside / 400 > 0.94


def test_a_difference_without_seeds_or_images_says_what_it_leaves_out():
    alone = uncertainty.pooled_spread([[0.9], [0.8]])
    found = uncertainty.difference([0.9], [0.8], alone, num_images=100)
    half = 1.959964 * math.sqrt(0.09 / 100 + 0.16 / 100)
    assert (found.seeds_known, found.paired) == (False, False)
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((0.1 - half, 0.1 + half), rel=1e-5)
    assert found.decided


# The index


def pair(first: dict, second: dict, **options) -> list[Entry]:
    return [
        make_entry("few", fraction=0.25, hits=first, **options),
        make_entry("many", fraction=1.0, hits=second, **options),
    ]


def right(accuracy: float, seed: int, num: int = 2000) -> np.ndarray:
    return np.random.default_rng(seed).random(num) < accuracy


def told(entries: list[Entry]) -> tuple[str, str, str]:
    found = comparison.winners(entries)
    best, least = comparison.reference(found), comparison.cheapest(found)
    assert best is not None
    assert least is not None
    between = comparison.spread(entries)
    return (*answer(least, best, between), sureness(entries, found, best, between))


def test_the_index_tells_a_clear_loss_a_draw_and_the_same_winner():
    good, bad = [right(0.9, 1), right(0.9, 2)], [right(0.7, 3), right(0.7, 4)]
    figure, text, sure = told(pair({"t000": bad}, {"t002": good}))
    assert figure.startswith("−2")
    assert "It is worse by" in text
    assert "another, which can be told apart from it, by few" in sure
    near = [right(0.9, 5), right(0.9, 6)]
    _, text, sure = told(pair({"t000": near}, {"t002": good}))
    assert "cannot be told from zero" in text
    assert "another, which cannot be told apart from it, by few" in sure
    figure, text, sure = told(pair({"t002": near}, {"t002": good}))
    assert figure == "same winner"
    assert "found the configuration that probing on" in text
    assert "the same configuration was found by few" in sure


def test_trials_of_one_name_and_other_hyperparameters_are_not_the_same_configuration():
    good = [right(0.9, 1), right(0.9, 2)]
    entries = [
        make_entry("few", fraction=0.25, hits={"t002": good}, seed=1),
        make_entry("many", hits={"t002": good}, seed=2),
    ]
    found = comparison.winners(entries)
    assert not comparison.same_configuration(found["few"], found["many"])
    stages = comparison.stages(entries)
    few = next(stage for stage in stages if stage.entry.name == "few")
    many = next(stage for stage in stages if stage.entry.name == "many")
    assert comparison.common_trials(few, many) == []


def test_costs_and_ratios_are_those_of_the_studies():
    entries = pair({"t000": [right(0.8, 1)] * 2}, {"t002": [right(0.9, 2)] * 2})
    data = comparison.summary_data(entries).set_index("name")
    for entry in entries:
        cost = entry.result.cost
        assert data.loc[entry.name, "total"] == cost.tier1 + cost.tier2 + cost.verification
        assert data.loc[entry.name, "tier1_ratio"] == pytest.approx(
            cost.tier1 / entries[1].result.cost.tier1
        )
    assert data.loc["many", "verdict"] == "the reference"


def test_rank_agreement_is_kendalls_over_the_common_trials():
    entries = [make_entry("few", fraction=0.25, num_trials=20), make_entry("many", num_trials=20)]
    for entry in entries[:1]:  # another ladder: not the same trainings
        rungs = tuple(replace(r, num_examples=r.num_examples // 2) for r in entry.result.rungs)
        entries[0] = replace(entry, result=replace(entry.result, rungs=rungs))
    stages = comparison.stages(entries)
    data = comparison.agreement_data(stages)
    by_label = {stage.label: stage for stage in stages}
    assert len(data) == 9
    for row in data.to_dict("records"):
        first, second = by_label[row["first"]], by_label[row["second"]]
        shared = sorted(set(first.accuracies) & set(second.accuracies))
        assert row["num_trials"] == len(shared)
        if len(shared) > 2:
            tau = stats.kendalltau(
                [first.accuracies[t] for t in shared], [second.accuracies[t] for t in shared]
            ).statistic
            assert row["tau"] == pytest.approx(tau, nan_ok=True)
        best = max(shared, key=lambda t: second.accuracies[t])
        place = 1 + sum(first.accuracies[t] > first.accuracies[best] for t in shared)
        assert row["second_best"] == place


def test_trainings_that_two_studies_did_alike_are_compared_and_not_taken_for_agreement():
    entries = [make_entry("few"), make_entry("many")]
    num, equal, gap = comparison.repeats(entries)
    assert (equal, gap) == (num, 0.0)
    verified = len(entries[0].result.verifications)
    assert num == verified + sum(len(s.accuracies) for s in comparison.stages(entries[:1]))
    pairs = comparison.agreement_data(comparison.stages(entries))
    assert len(pairs) == 6  # three rungs against the two others of the other study
    assert len(comparison.distinct(comparison.stages(entries))) == 3


def test_the_spread_counts_a_training_done_by_two_studies_once_and_leaves_bad_ones_out():
    runs = {"t000": [right(0.9, 1), right(0.92, 2)], "t002": [right(0.5, 3), right(0.8, 4)]}
    once = comparison.spread([make_entry("few", hits=runs)])
    twice = comparison.spread([make_entry("few", hits=runs), make_entry("many", hits=runs)])
    values = [float(r.mean()) for r in runs["t000"]]
    assert once.degrees == twice.degrees == 1
    assert once.variance == pytest.approx(twice.variance) == pytest.approx(np.var(values, ddof=1))


# Pages


def page_of_test(entry: Entry) -> str:
    return matrix.document_html(entry, "test")


def entry_with(said, name="made_10") -> Entry:
    return make_entry(name, predictions=said)


def all_pages(entries: list[Entry]) -> dict[str, str]:
    found = {"index.html": matrix.index_html(entries, name="made", file="made.yaml")}
    for entry in entries:
        for document, content in matrix.documents(entry).items():
            found[file_name(entry, document)] = content
    return found


@cache
def pages_of_states() -> dict[str, str]:
    entries = [*STATES.values(), make_entry("images", predictions=make_predictions(300, 30))]
    return all_pages(entries)


STATES = {
    "finished": make_entry("done"),
    "missing": Entry("gone", "missing", "", make_entry().definition),
    "damaged": Entry("torn", "damaged", "ledger.jsonl:3: damaged line", make_entry().definition),
    "interrupted": make_entry("cut", status="interrupted", until="tier1"),
    "running": make_entry("busy", status="running", until="score"),
}


def test_a_configuration_that_is_not_finished_is_on_every_page_with_its_reason():
    pages = pages_of_states()
    index = Page(pages["index.html"])
    text = " ".join(index.words.values())
    for state, entry in STATES.items():
        assert entry.name in text
        for document, _ in DOCUMENTS:
            assert f'href="{entry.name}_{document}.html"' in pages["index.html"]
            assert len(pages[file_name(entry, document)]) > 1000
        if state != "finished":
            assert re.search(f"{entry.name}</th>.*?>{state}</td>", pages["index.html"], re.S)
    assert "damaged line" in pages["torn_test.html"]
    assert "has not been run" in pages["gone_training.html"]
    assert "was interrupted" in pages["cut_log.html"]
    assert "missing" in pages["gone_log.txt"]
    assert "Without a result" not in text or "gone" in text


def test_a_failed_study_tells_its_reason():
    entry = make_entry("bad", until="tier1")
    failed = replace(entry.result, status="failed", winner_reason="everything diverged")
    entry = replace(entry, status="failed", result=failed)
    pages = all_pages([entry])
    for name in ("index.html", "bad_training.html", "bad_test.html", "bad_log.html"):
        assert "everything diverged" in pages[name], name


def test_a_study_of_another_definition_is_shown_as_such():
    entry = replace(STATES["interrupted"], changed=("tier1.num_trials (24 and 8)",))
    for page in (v for k, v in all_pages([entry]).items() if k.endswith(".html")):
        assert "tier1.num_trials (24 and 8)" in page


def test_predictions_that_are_gone_cost_the_images_and_not_the_accuracy():
    entry = make_entry()
    trainings = tuple(
        replace(t, predictions=None, problem="predictions p.npz were altered")
        for t in entry.trainings
    )
    page = page_of_test(replace(entry, trainings=trainings))
    assert "predictions p.npz were altered" in page
    assert "test accuracy of" in page
    document = document_of_test(entry, "")
    assert [s.key for s in document.sections] == [
        "accuracy",
        "classes",
        "confusion",
        "calibration",
        "gallery",
    ]


def test_the_same_studies_give_the_same_bytes():
    said = make_predictions(300, 30)
    again = all_pages([STATES["finished"], make_entry("images", predictions=said)])
    before = pages_of_states()
    assert len(again) == 9
    assert {k: v for k, v in again.items() if k != "index.html"}.items() <= before.items()


def test_pages_load_nothing_run_nothing_foreign_and_name_every_image():
    for name, content in pages_of_states().items():
        if name.endswith(".txt"):
            continue
        page = Page(content)
        sources = [a["src"] for tag, a in page.tags if "src" in a]
        assert all(source.startswith("data:image/png;base64,") for source in sources), name
        links = [a["href"] for tag, a in page.tags if tag == "a"]
        assert all(re.fullmatch(r"#[\w-]+|[\w./-]+\.(html|txt)", link) for link in links), links
        assert not re.search(r"https?://", content), name
        assert all(a.get("alt") for tag, a in page.tags if tag == "img"), name
        scripts = [a for tag, a in page.tags if tag == "script"]
        assert len(scripts) == 1
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(ids) == len(set(ids)), name
        assert content.count("<h1") == 1


def test_hostile_names_are_text_on_every_page():
    said = make_predictions(200, 4, names=(EVIL, HOSTILE, "\x00\u202e", "a&amp;b"))
    entry = make_entry("made", predictions=said, hostile=EVIL)
    for name, content in all_pages([entry]).items():
        if name.endswith(".txt"):
            assert "\x00" not in content
            assert "\u202e" not in content
            continue
        page = Page(content)
        tags = [tag for tag, _ in page.tags]
        assert tags.count("script") == 1, name
        assert not any("onerror" in a or "onload" in a for _, a in page.tags), name
        assert not any(
            tag == "img" and not a["src"].startswith("data:image/png") for tag, a in page.tags
        )
        assert "\x00" not in content
    test = page_of_test(entry)
    assert "&lt;script&gt;document.title" in test


def test_a_hundred_classes_stay_under_two_megabytes_and_show_the_matrix_as_a_picture():
    names = [f"a_rather_long_class_name_{i}" for i in range(100)]
    said = make_predictions(10_000, 100, names=names, side=32, channels=3, accuracy=0.5)
    page = page_of_test(entry_with(said))
    assert len(page.encode()) < 2_000_000
    assert 'href="data:image/png' in page
    assert page.count("<img") == 72
    assert '<table class="confusion">' not in page
    many = make_predictions(2000, 400, side=48, channels=3)
    page = page_of_test(entry_with(many))
    assert "too many classes for a picture" in page
    assert len(page.encode()) < 2_000_000


def test_ten_classes_are_a_table_with_every_count():
    said = make_predictions(500, 10)
    page = Page(page_of_test(entry_with(said)))
    counts = confusion.confusion_counts(said)
    cells = [a for tag, a in page.tags if tag == "td" and "--s:" in a.get("style", "")]
    assert len(cells) == 100
    titles = [a["title"] for a in cells if "title" in a]
    assert len(titles) == int((counts > 0).sum())
    assert f"kind 0 taken for kind 0: {counts[0, 0]}" in titles


def test_the_gallery_shows_the_pixels_it_was_given():
    said = make_predictions(60, 3, side=5, channels=3)
    index = int(said.random[0])
    (picture,) = gallery.pictures(said, [index])
    import base64
    import struct

    png = base64.b64decode(picture.uri.split(",")[1])
    width, height, depth, colour = struct.unpack(">IIBB", png[16:26])
    assert (width, height, depth, colour) == (5, 5, 8, 2)
    place, data = 8, b""
    while place < len(png):
        length, kind = struct.unpack(">I4s", png[place : place + 8])
        data += png[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += 12 + length
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(5, 16)
    if (rows[:, 0] == 0).all():  # no filter: the bytes are the pixels
        assert (rows[:, 1:].reshape(5, 5, 3) == said.images[index]).all()
    assert (picture.true, picture.right) == (
        said.class_names[said.labels[index]],
        bool(said.hits[index]),
    )


# Log and training report


def test_the_log_has_every_trial_decision_and_result_and_the_winners_epochs_only():
    entry = make_entry(num_trials=12)
    text = log_text(entry)
    for event in entry.events:
        if event["event"] == "trial":
            assert f"{event['trial']['trial_id']}: " in text
        elif event["event"] == "decision":
            assert event["decision"]["reason"] in text
        elif event["event"] == "job_end":
            assert f"{event['end']['job_id']} {event['end']['outcome'].replace('_', ' ')}" in text
    winner = entry.result.winner
    epochs = [line for line in log_lines(entry) if line.kind == "epoch"]
    expected = sum(
        e["event"] == "point" and e["kind"] == "verify" and e["trial_id"] == winner
        for e in entry.events
    )
    assert len(epochs) == expected > 0
    assert all(line.text.startswith(f"{winner}-v") for line in epochs)
    assert [line.seconds for line in log_lines(entry)] == sorted(
        line.seconds for line in log_lines(entry)
    )
    page = matrix.document_html(entry, "log")
    assert page.count("<time>") == text.count("\n") - 1


def test_points_that_a_second_driver_reported_again_replace_the_first():
    events = make_events(num_trials=8)
    training_events = [e for e in events if e["event"] == "point" and e["kind"] == "verify"]
    again = {**training_events[2], "point": {**training_events[2]["point"], "train_loss": 9.0}}
    place = events.index(training_events[4])
    (first, *_) = full_trainings([*events[:place], again])
    assert [p.epoch for p in first.points] == [1, 2, 3]
    assert first.points[-1].train_loss == 9.0


def test_the_training_report_draws_the_points_of_the_ledger():
    entry = make_entry()
    data = training.training_data(entry.trainings, entry.result.winner)
    own = training.winners_rows(data)
    points = [
        e["point"]["validation_accuracy"]
        for e in entry.events
        if e["event"] == "point" and e["kind"] == "verify" and e["trial_id"] == entry.result.winner
    ]
    assert own["validation_accuracy"].tolist() == points
    document = training_document(entry)
    assert [s.key for s in document.sections] == [
        "trainings",
        "recipe",
        "ladder",
        "curves",
        "cost",
    ]
    page = matrix.document_html(entry, "training")
    assert 'href="../studies/report.html"' in page
    for name, value in next(
        t.trial.hyperparameters
        for t in entry.result.trials
        if t.trial.trial_id == entry.result.winner
    ).items():
        assert name in page
        assert str(value) in page or f"{value:.4g}" in page


def test_every_file_is_written_and_named(tmp_path: Path):
    entries = [make_entry("few", fraction=0.25), make_entry("many"), STATES["missing"]]
    written = matrix.write_matrix(entries, tmp_path / "out", name="made")
    assert written[0].name == "index.html"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["index.html"]
        + [
            f"{entry.name}_{what}"
            for entry in entries
            for what in ("training.html", "test.html", "log.html", "log.txt")
        ]
    )


def test_an_index_of_nothing_says_so():
    document = index_document([STATES["missing"], STATES["interrupted"]])
    assert "nothing to compare yet: of 2 configurations 1 missing and 1 interrupted" in (
        document.headline
    )
    assert document.figure == ""
