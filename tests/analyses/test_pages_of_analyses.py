"""What the analyses share."""

import ast
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError
from matplotlib.figure import Figure
from pyro.infer import SVI
from scipy.stats import sem

import analyses
from analyses import elbo_gap, pages
from analyses.command import make_parser, out_folder, run_analysis
from analyses.pages import make_page, mean_and_error, page_lines
from pyro_vae.app.pages import Formula, Heading, Note, Paragraph, Picture, Table, Verbatim
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


@pytest.fixture
def template(tmp_path, monkeypatch):
    """A template of every kind of block; nothing in it may be taken for HTML."""
    text = r"""# Growth of {{ data }}

## First

Numbers: {{ height|form(".2f") }}
and 1 < 2.

> Beware of {{ data }}.

$$ p(x) = \sum_{k} \pi_k $$

![How it (the height) rises.](rise)

![](rows)

|  | a |
| b, c | d (e) |

{{ paragraphs(["one", "two"]) }}

## How it was made

![](command)
"""
    (tmp_path / "growth.md.j2").write_text(text)
    loader = pages._environment().loader
    monkeypatch.setattr(loader, "searchpath", [str(tmp_path)])


@pytest.mark.usefixtures("template")
def test_a_template_becomes_the_parts_of_a_page():
    told = {"data": "peas & beans", "height": np.float64(1.5), "command": "grow  --tiny"}
    rise, rows = Figure(), [{"day": "1", "cm": "2"}, {"day": "2", "cm": "30"}]
    page = make_page("growth", rise=rise, rows=rows, **told)
    assert page.title == "Growth of peas & beans"
    assert page.parts == [
        Heading("First"),
        Paragraph("Numbers: 1.50 and 1 < 2."),
        Note("Beware of peas & beans."),
        Formula(r"p(x) = \sum_{k} \pi_k"),
        Picture(rise, "How it (the height) rises."),
        Table(["day", "cm"], [["1", "2"], ["2", "30"]]),
        Table(["", "a"], [["b, c", "d (e)"]]),
        Paragraph("one"),
        Paragraph("two"),
        Heading("How it was made"),
        Verbatim("grow  --tiny"),
    ]
    said = "\n".join(page_lines(page))
    assert "## First" in said
    assert "day  cm\n1    2\n2    30" in said
    assert "grow" not in said
    with pytest.raises(UndefinedError, match="height"):
        make_page("growth", data="peas")


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
    returned = {package / "runs" / "train.py"}  # to a caller who is in this list
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
    def write(text, end=None):
        def analysis(out):
            out.folder.mkdir(parents=True)
            (out.folder / "report.html").write_text(text)
            if end is not None:
                raise end
            return out.folder / "report.html"

        return run_analysis(analysis, given("--out", str(out)))

    out = tmp_path / "results" / "growth"
    assert write("first") == 0
    assert capsys.readouterr().out == f"\n{out / 'report.html'}\n"
    (out / "notes.txt").write_text("mine")
    ends = {130: KeyboardInterrupt("fit interrupted"), 2: DatasetError("no beans")}
    for status, end in ends.items():
        assert write("half", end) == status
        assert (out / "report.html").read_text() == "first"
    unfinished = tmp_path / "results" / "growth.unfinished"
    said = capsys.readouterr().err
    assert f"what was measured so far is in {unfinished}" in said
    assert "no beans" in said
    with pytest.raises(ZeroDivisionError):
        write("half", ZeroDivisionError())
    assert write("second") == 0
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
