"""The page and the table of a batch: made from the ledger alone, and true to it."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from batch_ledgers import make_ledger
from scipy import stats
from study_runs import environment
from typer.testing import CliRunner

from llp.batch_results import write_results
from llp.cli import app
from llp.comparing.significance import PairedTest
from llp.comparing.table import COLUMNS, completed, definition, runs_table
from llp.errors import StudyError
from llp.reporting import formats
from llp.reporting.batch_page import compared, difference_exhibit, references, verdict
from llp.reporting.figures.batches import curves_figure
from llp.tracking.ledger import Ledger, read_events

WITHOUT = """\
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "ray", "mlflow", "optuna"):
            raise ImportError(f"{name} is not to be imported")
sys.meta_path.insert(0, Blocked())
from llp.cli import main
main()
"""


def plain(text: str) -> str:
    return text.replace(formats.NBSP, " ").replace("−", "-")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    batch = make_ledger(tmp_path_factory.mktemp("batch"), bad=["mlp-s4"])
    write_results(batch.folder)
    return batch.folder


def test_the_table_has_a_row_a_training_and_every_column(folder):
    table = pd.read_parquet(folder / "runs.parquet")
    assert tuple(table.columns) == COLUMNS
    kinds = table["kind"].value_counts().to_dict()
    assert kinds == {
        "candidate": 6,
        "final": 25,
        "ablation": 15,
        "sensitivity": 10,
        "scaling": 20,
    }
    assert len(set(table["job_id"])) == len(table)
    row = table[table["job_id"] == "same.sensitivity-01-s3"].iloc[0]
    assert row["changed"] == '{"valley_strength": 2}'
    assert (row["optimizer"], row["model"], row["seed"]) == ("talt", "convnet", 3)
    assert list(row["curve_epoch"]) == [1, 2, 3, 4]
    assert row["curve_validation_accuracy"][-1] == pytest.approx(
        row["test_accuracy"] * (1 - 1 / 16)
    )
    few = table[table["configuration_id"] == "sgd.scaling-02"]
    assert set(few["num_examples"]) == {250}


def test_failures_are_rows_with_a_reason_and_leave_the_means(folder):
    table = pd.read_parquet(folder / "runs.parquet")
    bad = table[table["outcome"] != "completed"]
    assert bad[["job_id", "outcome"]].values.tolist() == [["mlp-s4", "diverged"]]
    assert "nan" in bad["failure"].iloc[0]
    assert math.isnan(bad["test_accuracy"].iloc[0])
    page = (folder / "report.html").read_text()
    assert "Not completed: 1 diverged." in plain(page)
    assert "the loss &lt;b&gt;is&lt;/b&gt; nan" in page
    assert "<b>is</b>" not in page


def test_everything_is_compared_with_the_reference_of_its_dataset_and_model(folder):
    events = list(read_events(folder))
    runs = runs_table(events)
    assert references(runs, definition(events)) == {
        ("digits", "convnet"): "sgd",
        ("digits", "mlp"): "mlp",
    }
    tests = {test.label: test for test in compared(runs, definition(events))}
    assert set(tests) == {"good", "same", "mlp_sam"}
    assert tests["mlp_sam"].num_pairs == 4  # seed 4 of mlp diverged
    done = completed(runs).set_index(["label", "seed"])["test_accuracy"]
    known = stats.ttest_rel(done["good"], done["sgd"])
    assert tests["good"].p_value == pytest.approx(known.pvalue)
    assert tests["good"].decided
    assert tests["good"].difference == pytest.approx((done["good"] - done["sgd"]).mean())


def test_the_page_says_who_helped_and_who_cannot_be_told_apart(folder):
    page = plain((folder / "report.html").read_text())
    assert "Made up: which helps?" in page
    assert re.search(r"good helped: \+\d\.\d\d points against sgd \(95 % interval", page)
    assert re.search(r"same cannot be told apart from sgd: [+-]\d\.\d\d points", page)
    assert "without smoothing_factor -3." in page
    for heading in ("Optimizer and architecture", "What was chosen", "How does it scale?"):
        assert heading in page


def test_the_page_loads_nothing_and_is_the_same_every_time(folder):
    before = (folder / "report.html").read_bytes()
    write_results(folder)
    assert (folder / "report.html").read_bytes() == before
    text = before.decode()
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    assert "url(http" not in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_rendering_needs_neither_torch_nor_ray_nor_the_images(tmp_path):
    batch = make_ledger(tmp_path)
    command = [sys.executable, "-c", WITHOUT, "batch", "made_up.yaml", "--render-only"]
    command += ["--set", f"defaults.output.root={batch.root}"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(batch.folder / "report.html"),
        str(batch.folder / "runs.parquet"),
    ]
    assert "good helped" in done.stderr


def test_a_batch_that_is_not_finished_says_so(tmp_path):
    text = "version: 1\nname: n\nbase: digits\nruns: {a: {seeds: 2}}\n"
    batch = make_ledger(tmp_path, text=text, finished=False)
    result = write_results(batch.folder)
    assert "The batch is not finished. The same command goes on" in result.page.read_text()


def test_a_batch_with_nothing_but_failures_has_a_page(tmp_path):
    text = "version: 1\nname: n\nbase: digits\nruns: {a: {seeds: 2}, b: {}}\n"
    batch = make_ledger(
        tmp_path, text=text, levels={"a": 0.9, "b": 0.9}, bad=["a-s0", "a-s1", "b-s0"]
    )
    result = write_results(batch.folder)
    assert result.answer == "No full training has been completed yet."
    assert result.outcomes == {"diverged": 3}


def test_one_run_alone_has_a_page(tmp_path):
    text = "version: 1\nname: n\nbase: digits\nruns: {a: {seeds: 3}}\n"
    batch = make_ledger(tmp_path, text=text, levels={"a": 0.9})
    assert re.match(r"a has \d\d\.\d\d % ± \d", write_results(batch.folder).answer)


def test_a_chosen_value_at_the_end_of_its_grid_is_told(tmp_path):
    text = "version: 1\nname: n\nbase: digits\nruns:\n  sgd:\n    choose: {}\n"
    text += "    grid: {learning_rate: [0.03, 0.1, 0.3]}\n"
    folder = make_ledger(tmp_path, text=text).folder
    assert "No chosen value is at the end" in write_results(folder).page.read_text()
    with Ledger.open(folder) as ledger:
        results = {f"sgd.k{k:03d}": [0.9 - 0.1 * k, 0.1] for k in range(3)}
        ledger.append("chosen", run="sgd", configuration_id="sgd.k000", results=results)
        ledger.append("finished", winner=None, winner_reason="")
    page = write_results(folder).page.read_text()
    assert "At the end of its grid: sgd (learning_rate 0.03)." in page


def test_verdicts_in_words():
    def test(**given: float) -> PairedTest:
        values = {
            "num_pairs": 5,
            "difference": 0.01,
            "standard_error": 0.002,
            "low": 0.004,
            "high": 0.016,
            "statistic": 5.0,
            "p_value": 0.007,
            "exact_p_value": 0.0625,
            "adjusted": 0.02,
            **given,
        }
        return PairedTest("sam", "sgd", **values)  # type: ignore[arg-type]

    assert plain(verdict(test())) == (
        "sam helped: +1.00 points against sgd (95 % interval +0.40 to +1.60; p = 0.02 after Holm; "
        "5 seeds)."
    )
    assert verdict(test(difference=-0.01)).startswith("sam hurt: ")
    assert "p < 0.0001 after Holm" in verdict(test(adjusted=1e-6))
    assert verdict(test(adjusted=0.2)).startswith("sam cannot be told apart from sgd: ")
    assert "nothing to compare" in verdict(test(num_pairs=0))
    open_ones = [test(adjusted=0.2)] * 2
    readings = [difference_exhibit(open_ones[:k], "k", "Did it help?").reading for k in (1, 2)]
    assert readings == [
        "The comparison is not decided.",
        "None of the 2 comparisons is decided.",
    ]


def test_curves_have_ticks_at_whole_epochs_alone():
    curve = {"curve_epoch": [1, 2, 3], "curve_validation_accuracy": [0.2, 0.4, 0.5]}
    drawn = curves_figure(pd.DataFrame([{"label": "sgd", **curve}]), ["sgd"])
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", drawn)
    ticks = [text for text in texts[: texts.index("epoch")] if "%" not in text]
    assert ticks == ["1", "2", "3"]


@pytest.mark.parametrize("command", ["status", "report", "export", "resume"])
def test_commands_for_searches_leave_a_batch_alone(folder, command):
    before = (folder / "report.html").read_bytes()
    done = CliRunner().invoke(app, [command, folder.name, "--root", str(folder.parent)])
    assert done.exit_code == 4
    assert "is a batch and no search" in done.stderr
    assert (folder / "report.html").read_bytes() == before


def test_a_folder_without_a_batch_is_refused(tmp_path):
    with pytest.raises(StudyError, match="no study in"):
        write_results(tmp_path)
    Ledger.create(tmp_path / "s", study_id="s").close()
    with pytest.raises(StudyError, match="holds no batch"):
        write_results(tmp_path / "s")
