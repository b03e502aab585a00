"""The analysis of the ELBO gap runs from its command line and writes what it says."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analyses.elbo_gap import main, number
from pyro_vae import LinearGaussian, elbo_gap
from pyro_vae.plots import plot_gap, plot_widest_gaps
from pyro_vae.results import Result, load_result


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.float32
def test_main_writes_results_figures_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gap"
    assert main(["--tiny", "--no-progress", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "## What moves it" in said
    names = {path.name for path in out.iterdir()}
    titles = ("base", "encoder_3", "guide_full")
    assert names == {
        *(f"{title}_{split}.nc" for title in titles for split in ("training", "test")),
        *(f"{name}.png" for name in ("gap", "movement", "widest")),
        "surgery.nc",
        "report.html",
    }
    decomposition = load_result(out / "base_test.nc")
    assert {"gain_full", "gain_flow"} <= set(decomposition.data_vars)
    assert "gain_full" not in load_result(out / "encoder_3_test.nc")
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 3


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--data {digits,mnist,fashion_mnist}" in said
    assert "calls for a larger encoder" in said


@pytest.fixture
def decomposition() -> Result:
    pair = LinearGaussian(data_dim=6, latent_dim=2)
    x = pair.sample(5)
    return elbo_gap(
        pair.model,
        pair.guide,
        x,
        evidence="exact",
        richer=("full",),
        max_steps=20,
        num_particles=50,
        progress=False,
    )


def test_an_unreliable_error_has_a_question_mark(decomposition: Result) -> None:
    assert re.fullmatch(r"-?\d+\.\d{3} ± 0\.\d{3}", number(decomposition, "gap"))
    pair = LinearGaussian(data_dim=6, latent_dim=2)
    few = elbo_gap(
        pair.model,
        pair.guide,
        pair.sample(5),
        evidence="importance",
        richer=(),
        max_steps=2,
        num_particles=4,  # too few for a k-hat
        progress=False,
    )
    assert number(few, "log_evidence").endswith("?")


def test_bars_are_the_parts_of_the_gap(decomposition: Result) -> None:
    ax = plot_gap({"first": decomposition, "second": decomposition})
    assert isinstance(ax, Axes)
    widths = [bar.get_width() for bar in ax.patches if isinstance(bar, Rectangle)]
    parts = [decomposition.quantity(f"{n}_gap").value for n in ("amortization", "approximation")]
    assert widths == pytest.approx([parts[0], parts[0], parts[1], parts[1]])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["first", "second"]
    own = Figure().add_subplot()
    assert plot_gap(decomposition, own) is own


def test_pictures_are_ordered_by_gap(decomposition: Result) -> None:
    figure = plot_widest_gaps(decomposition, torch.rand(5, 6), (2, 3), num_images=4)
    shown = [float(ax.get_title()) for ax in figure.axes if ax.get_title()]
    widest = np.sort(decomposition["gap"].values)[::-1][:4]
    assert shown == pytest.approx(widest, abs=0.051)
    with pytest.raises(ValueError, match="of 5 data and x has 4"):
        plot_widest_gaps(decomposition, torch.rand(4, 6), (2, 3))
