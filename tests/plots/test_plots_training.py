"""Figures of autoencoders and of training show the numbers they are given."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.extras.latents import directional_sensitivity
from pyro_vae.models import Denoising
from pyro_vae.plots import (
    plot_code_activity,
    plot_denoising,
    plot_gradient_draws,
    plot_learning_curves,
    plot_rates,
    plot_sample_grids,
    plot_sensitivity,
)
from pyro_vae.results import Result, label, make_result

SHAPE = (3, 5)  # of an image


class Halves(nn.Module):
    """Reconstructs half of what it sees; draws images of one grey."""

    def __init__(self, grey: float = 0.0) -> None:
        super().__init__()
        self.kind = Denoising("mask", 0.4)
        self.grey = nn.Parameter(torch.tensor(grey))

    def reconstruct(self, x: Tensor) -> Tensor:
        return x / 2

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        return self.grey.expand(num_samples, 15)


def result(variables: dict[str, Any], **coords: Any) -> Result:
    attrs = label(unit="nats", bound="none")
    return make_result(
        {name: (dims, values, attrs) for name, (dims, values) in variables.items()},
        function="test",
        config={},
        seed=0,
        data_sha256=None,
        coords=coords,
    )


def cell(image: np.ndarray, row: int, column: int) -> np.ndarray:
    return image[row * 4 : row * 4 + 3, column * 6 : column * 6 + 5].reshape(-1)


def test_denoising_has_rows_of_clean_noisy_and_restored_images() -> None:
    x = 0.1 + 0.9 * torch.rand(4, 15)
    before = torch.get_rng_state()
    ax: Any = plot_denoising(Halves(), x, SHAPE, num_images=3, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    (image,) = ax.get_images()
    whole = np.ma.filled(image.get_array(), np.nan)
    for i in range(3):
        noisy = cell(whole, 1, i)
        assert cell(whole, 0, i) == pytest.approx(x[i].numpy(), abs=1e-6)
        kept = noisy > 0
        assert noisy[kept] == pytest.approx(x[i].numpy()[kept], abs=1e-6)
        assert cell(whole, 2, i) == pytest.approx(noisy / 2, abs=1e-6)
    assert not (whole[4:7] > 0).all()
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names[0] == "clean"
    assert names[2].startswith("denoised\nerror 0.")
    with pytest.raises(ValueError, match="pass corruption"):
        plot_denoising(nn.Identity(), x, SHAPE)


def test_units_stand_most_first_under_the_target_of_the_prior() -> None:
    codes = torch.tensor([[0.1, -3.0], [0.1, 1.0], [2.0, 2.0]])
    left, middle, right = plot_code_activity(codes, rate=0.5, threshold=1.5).axes
    assert [bar.get_height() for bar in left.patches] == pytest.approx([2.0, 2.2 / 3])
    assert [bar.get_height() for bar in middle.patches] == pytest.approx([2 / 3, 1 / 3])
    assert left.lines[0].get_ydata()[0] == pytest.approx(2.0)
    assert middle.lines[0].get_ydata()[0] == pytest.approx(math.exp(-0.75))
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["2", "1"]
    density = right.lines[0]
    assert np.trapezoid(density.get_ydata(), density.get_xdata()) == pytest.approx(
        1 - math.exp(-0.5 * density.get_xdata()[-1]), rel=1e-3
    )


def test_medians_along_and_across_stand_in_the_row_of_their_encoder() -> None:
    x, tangents = torch.zeros(5, 3), torch.tensor([[1.0], [0.0], [0.0]]).expand(5, 3, 1)
    gains = torch.tensor([4.0, 0.0, 1.0])
    found = {
        "both": directional_sensitivity(lambda v: v * gains, x, tangents),
        "three": directional_sensitivity(lambda v: 3 * v, x, tangents),
    }
    ax: Any = plot_sensitivity(found)
    bars = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2]
    assert bars == pytest.approx([4.0, math.sqrt(0.5), 3.0, 3.0])
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names == ["both\nratio 5.66", "three\nratio 1"]
    with pytest.raises(ValueError, match="nothing to show"):
        plot_sensitivity({})


def test_gradients_stand_beside_the_closed_form() -> None:
    gradient = np.random.default_rng(0).normal(size=(2, 2, 50)) * np.array([[[1.0]], [[3.0]]])
    gradient[1, 0] = math.nan  # takes no single particle
    over = ("estimator", "num_particles")
    columns = {
        "gradient": ((*over, "draw"), gradient),
        "mean": (over, gradient.mean(-1)),
        "mean_se": (over, np.full((2, 2), 0.1)),
        "variance": (over, gradient.var(-1)),
        "variance_se": (over, np.full((2, 2), 0.1)),
    }
    found = result(columns, estimator=["PathwiseELBO", "LeaveOneOut"], num_particles=[1, 4])
    left, right = plot_gradient_draws(found, exact=0.25).axes
    (line,) = left.lines
    assert set(line.get_xdata()) == {0.25}
    texts = [text.get_text() for text in left.get_legend().get_texts()]
    assert texts[0].startswith("PathwiseELBO, K = 1: ")
    assert texts[1].startswith("LeaveOneOut, K = 4: ")
    shown = [line for line in right.lines if line.get_linestyle() == "None" or line.get_marker()]
    points = np.concatenate([c.lines[0].get_ydata() for c in right.containers])
    assert shown
    assert points == pytest.approx(gradient.var(-1)[[0, 0, 1], [0, 1, 1]])


def curves() -> Result:
    over = ("model", "algorithm", "split", "samples")
    values = np.arange(16.0).reshape(2, 2, 2, 2)
    return result(
        {"elbo": (over, values), "elbo_se": (over, np.full_like(values, 0.1))},
        model=["2 latents", "5 latents"],
        algorithm=["AEVB", "wake-sleep"],
        split=["train", "test"],
        samples=[10, 100],
    )


def test_curves_of_a_model_stand_in_its_panel() -> None:
    found = curves()
    panels = plot_learning_curves(found).axes
    assert [ax.get_title() for ax in panels] == ["2 latents", "5 latents"]
    for i, ax in enumerate(panels):
        drawn = np.array([line.get_ydata() for line in ax.lines])
        assert drawn.tolist() == found.elbo.values[i].reshape(4, 2).tolist()
        assert [line.get_linestyle() for line in ax.lines] == ["-", "--", "-", "--"]
    several = plot_learning_curves({"100 data": found, "900 data": found}).axes
    assert [ax.get_title() for ax in several if ax.get_visible()][2] == "900 data, 2 latents"
    with pytest.raises(ValueError, match="no log_evidence"):
        plot_learning_curves(found, variable="log_evidence")


def test_each_model_has_a_panel_of_its_draws() -> None:
    figure = plot_sample_grids({"two": Halves(0.25), "ten": Halves(0.75)}, SHAPE, num_images=4)
    for ax, name, grey in zip(figure.axes, ("two", "ten"), (0.25, 0.75), strict=True):
        (image,) = ax.get_images()
        assert ax.get_title() == name
        assert set(np.unique(np.ma.compressed(image.get_array())).tolist()) == {grey}
    with pytest.raises(ValueError, match="no models"):
        plot_sample_grids({}, SHAPE)


def test_rates_are_information_and_marginal_kl() -> None:
    found = {}
    for name, information in (("ELBO", -0.01), ("InfoVAE", 2.0)):
        columns = {"mutual_information": information, "marginal_kl": 0.5, "distortion": 3.0}
        found[name] = result({n: ("datum", [v - 1, v + 1]) for n, v in columns.items()})
    ax: Any = plot_rates(found)
    bars = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    assert np.array(bars) == pytest.approx(np.array([(0, 0), (0, 0.5), (0, 2), (2, 0.5)]))
    assert ax.lines[0].get_xdata()[0] == pytest.approx(math.log(2))
    assert ax.texts[1].get_text() == "2.00 + 0.50, reconstruction -3.00"
    with pytest.raises(ValueError, match="nothing to show"):
        plot_rates({})
