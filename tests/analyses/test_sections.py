"""What the analyses share."""

import ast
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from pyro.infer import SVI
from scipy.stats import sem

import analyses
from analyses import elbo_gap
from analyses.command import make_parser, out_folder, run_on_one_thread
from analyses.sections import mean_and_error
from pyro_vae.data import DatasetError


def test_mean_and_error_are_those_of_the_known_values():
    values = np.array([1.0, math.nan, 4.0, -2.0, 0.5])
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(0.875)
    assert error == pytest.approx(sem(values, nan_policy="omit"))
    # Not the error over all five places.
    assert error != pytest.approx(np.nanstd(values, ddof=1) / math.sqrt(5))


def test_one_value_has_no_error_and_none_has_no_mean():
    mean, error = mean_and_error(np.array([3.0, math.nan]))
    assert mean == 3.0
    assert math.isnan(error)
    assert all(math.isnan(number) for number in mean_and_error(np.array([math.nan])))


# --- how an analysis begins and ends --------------------------------------------------------------

TRAININGS = {"fit", "fit_em", "fit_divergence"}


def unasked(source):
    """Lines whose training nobody asks whether Ctrl-C ended it."""
    tree = ast.parse(source)
    asked = {
        id(node.value) for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "require_finished"
    }  # fmt: skip
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in TRAININGS
        and id(node) not in asked
    ]


def test_nobody_measures_a_training_that_was_interrupted():
    root = Path(analyses.__file__).parents[1]
    package = root / "pyro_vae"
    returned = {package / "runs.py"}  # to a caller who is in this list
    folders = ("analyses", "benchmarks", "pyro_vae/diagnostics", "pyro_vae/extras")
    paths = [path for folder in folders for path in (root / folder).rglob("*.py")]
    found = {str(path): unasked(path.read_text()) for path in paths if path not in returned}
    assert {path: lines for path, lines in found.items() if lines} == {}
    assert unasked("a = fit(x)\nb = fit(x).require_finished()\nfit_em(x)") == [1, 3]


def given(*arguments):
    parser = make_parser("growth", "How things grow.", data=("beans", "peas"))
    return parser.parse_args(arguments)


def test_the_folder_says_which_data_are_in_it():
    results = Path("results")
    assert out_folder(given()) == results / "growth"
    assert out_folder(given("--data", "peas")) == results / "growth-peas"
    assert out_folder(given("--data", "peas", "--out", "mine")) == Path("mine")
    for asked in ([], ["--data", "beans"]):  # other data than those that were asked for
        assert out_folder(given(*asked), used="peas") == results / "growth-peas"
    assert out_folder(given("--out", "mine"), used="peas") == Path("mine-peas")


def test_results_take_their_place_when_all_is_done(tmp_path, capsys):
    def write(folder, text, end=None):
        folder.mkdir(parents=True)
        (folder / "report.html").write_text(text)
        if end is not None:
            raise end
        return folder / "report.html"

    out = tmp_path / "results" / "growth"
    assert run_on_one_thread(lambda folder: write(folder, "first"), out) == 0
    assert capsys.readouterr().out == f"\n{out / 'report.html'}\n"
    (out / "notes.txt").write_text("mine")
    ends = {130: KeyboardInterrupt("fit interrupted"), 2: DatasetError("no beans")}
    for status, end in ends.items():
        assert run_on_one_thread(lambda folder, e=end: write(folder, "half", e), out) == status
        assert (out / "report.html").read_text() == "first"
    unfinished = tmp_path / "results" / "growth.unfinished"
    said = capsys.readouterr().err
    assert f"what was measured so far is in {unfinished}" in said
    assert "no beans" in said
    with pytest.raises(ZeroDivisionError):
        run_on_one_thread(lambda folder: write(folder, "half", ZeroDivisionError()), out)
    assert run_on_one_thread(lambda folder: write(folder, "second"), out) == 0
    assert (out / "report.html").read_text() == "second"
    assert sorted(path.name for path in out.parent.iterdir()) == ["growth"]
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.float32
def test_ctrl_c_in_a_training_ends_the_analysis(tmp_path, monkeypatch, capsys):
    real, steps = SVI.step, iter("ab")

    def step(self, *args, **kwargs):
        if next(steps, None) == "b":
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SVI, "step", step)
    out = tmp_path / "gap"
    assert elbo_gap.main(["--tiny", "--no-progress", "--out", str(out)]) == 130
    assert not out.exists()
    assert "fit interrupted" in capsys.readouterr().err
