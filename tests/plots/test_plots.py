"""Figures show the numbers they are given, and change nothing else."""

from statistics import NormalDist
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Normal

from pyro_vae import VAE, Autoencoder
from pyro_vae.plots import (
    pixels_text,
    plot_bound,
    plot_estimator_cost,
    plot_evidence,
    plot_latent,
    plot_manifold,
    plot_picture_rows,
    plot_posterior,
    plot_reconstructions,
    plot_sample_rows,
    plot_samples,
    plot_signal_to_noise,
)
from pyro_vae.results import Result, label, make_result

SHAPE = (3, 5)  # of an image


def history(rows: int, held_out: bool = True) -> Result:
    curves = {
        "bound": [-9.0 + 0.1 * i for i in range(rows)],
        "reconstruction": [-7.0 + 0.1 * i for i in range(rows)],
        "kl": [2.0] * rows,
    }
    if held_out:
        curves |= {f"validation_{name}": [v - 1 for v in c] for name, c in curves.items()}
    kinds = {name: "lower" if name.endswith("bound") else "objective" for name in curves}
    return make_result(
        {name: ("epoch", c, label(bound=kinds[name])) for name, c in curves.items()},
        function="fit",
        config={},
        seed=0,
        data_sha256=None,
        coords={"epoch": list(range(2, rows + 2))},
    )


def evidence(khat: list[float], particles: int = 1000) -> Result:
    size = len(khat)
    nats = {
        "elbo": [-9.0 - i for i in range(size)],
        "log_evidence": [-8.0 - 0.5 * i for i in range(size)],
    }
    variables: dict[str, Any] = {
        name: ("datum", values, label(bound="lower", num_particles=particles))
        for name, values in nats.items()
    }
    attrs = label(unit="none", bound="none", num_particles=particles)
    variables["khat"] = ("datum", khat, attrs)
    return make_result(variables, function="log_evidence", config={}, seed=0, data_sha256=None)


class Stub(nn.Module):
    """Decodes z to an image whose first two pixels are z, and encodes x as its first numbers."""

    def __init__(self, latent_dim: int = 2) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.weight = nn.Parameter(torch.zeros(()))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.cat([z, z.new_zeros(len(z), 15 - z.shape[1])], dim=1)

    def encode(self, x: torch.Tensor) -> Normal:
        return Normal(x[:, : self.latent_dim], 1.0)


def picture(ax: Any) -> np.ndarray:
    (image,) = ax.get_images()
    return np.ma.filled(image.get_array(), np.nan)


def cell(ax: Any, row: int, column: int) -> np.ndarray:
    """An image of the mosaic; the gap between images of 3 x 5 pixels is one pixel."""
    whole = picture(ax)
    return whole[row * 4 : row * 4 + 3, column * 6 : column * 6 + 5]


# --- numbers


def test_the_bound_is_drawn_with_its_parts() -> None:
    given = history(4)
    ax: Any = plot_bound(given, data="digits")
    lines = {line.get_label(): line for line in ax.get_lines()}
    for text, name in (
        ("ELBO, training", "bound"),
        ("reconstruction, training", "reconstruction"),
        ("ELBO, held out", "validation_bound"),
        ("reconstruction, held out", "validation_reconstruction"),
    ):
        np.testing.assert_array_equal(lines[text].get_xdata(), [2, 3, 4, 5])
        np.testing.assert_array_equal(lines[text].get_ydata(), given[name].values)
    assert lines["ELBO, training"].get_linestyle() != lines["ELBO, held out"].get_linestyle()
    bands = [collection.get_paths()[0].vertices[:, 1] for collection in ax.collections]
    assert [(band.min(), band.max()) for band in bands] == [
        (-9.0, given.reconstruction.values.max()),
        (-10.0, given.validation_reconstruction.values.max()),
    ]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "nats per datum")
    assert "digits" in ax.get_title()
    assert "1 particle" in ax.get_title()


def test_an_objective_is_not_called_a_bound() -> None:
    given = history(4)[["bound", "validation_bound"]]
    for name in given.data_vars:
        given[name].attrs["bound"] = "objective"
    ax: Any = plot_bound(given, data="digits")
    names = [line.get_label() for line in ax.get_lines()]
    assert names == ["objective, training", "objective, held out"]
    assert ax.get_title() == "Objective while training\ndigits, bounds nothing"


def test_a_long_history_has_a_logarithmic_axis() -> None:
    assert plot_bound(history(30)).get_xscale() == "log"
    assert plot_bound(history(5)).get_xscale() == "linear"


def test_a_single_epoch_can_be_seen() -> None:
    assert {line.get_marker() for line in plot_bound(history(1)).get_lines()} == {"o"}
    assert {line.get_marker() for line in plot_bound(history(9)).get_lines()} == {""}


def test_a_history_without_held_out_data_or_parts_is_drawn() -> None:
    assert len(plot_bound(history(3, held_out=False)).get_lines()) == 2
    (line,) = plot_bound(history(3)[["bound"]]).get_lines()
    assert line.get_label() == "ELBO, training"


def test_an_empty_history_is_refused() -> None:
    with pytest.raises(ValueError, match="has no rows"):
        plot_bound(make_result({}, function="fit", config={}, seed=0, data_sha256=None))


def test_the_evidence_is_parted_by_khat() -> None:
    # The threshold for 1000 particles is 1 - 1 / log10(1000) = 2/3.
    given = evidence([0.1, 0.66, 0.67, float("nan"), 0.3])
    ax: Any = plot_evidence(given, data="digits")
    good, bad = ax.collections[:2]
    np.testing.assert_array_equal(good.get_offsets(), [[-9, -8], [-10, -8.5], [-13, -10]])
    np.testing.assert_array_equal(bad.get_offsets(), [[-11, -9], [-12, -9.5]])
    np.testing.assert_array_equal(good.get_array(), [0.1, 0.66, 0.3])
    (diagonal,) = ax.get_lines()
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert "5 data, 1,000 particles" in ax.get_title()
    assert "nats" in ax.get_xlabel()
    assert "nats" in ax.get_ylabel()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["k-hat up to 0.67: 3 data", "k-hat above, or unknown: 2 data", "no gap"]


def test_evidence_that_is_exact_is_refused() -> None:
    with pytest.raises(ValueError, match="method='importance' and joint=False"):
        plot_evidence(evidence([0.1])[["elbo"]])


# --- pictures


def test_reconstructions_stand_below_their_data() -> None:
    module = VAE(data_dim=15, latent_dim=2, hidden=(4,))
    x = torch.bernoulli(torch.full((9, 15), 0.5))
    ax: Any = plot_reconstructions(module, x, SHAPE, num_images=4, data="made")
    with torch.no_grad():
        means = module.reconstruct(x[:4]).reshape(4, *SHAPE).numpy()
    assert picture(ax).shape == (2 * 4 - 1, 4 * 6 - 1)
    for i in range(4):
        np.testing.assert_array_equal(cell(ax, 0, i), x[i].reshape(SHAPE))
        np.testing.assert_allclose(cell(ax, 1, i), means[i], rtol=1e-6)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["data", "recon-\nstruction"]


def test_samples_are_those_of_their_seed() -> None:
    module = VAE(data_dim=15, latent_dim=2, hidden=(4,))
    state = torch.get_rng_state()
    ax: Any = plot_samples(module, SHAPE, num_images=7, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    drawn = module.sample(7, generator=torch.Generator().manual_seed(3)).reshape(7, *SHAPE)
    assert picture(ax).shape == (3 * 4 - 1, 3 * 6 - 1)
    for i in range(7):
        np.testing.assert_allclose(cell(ax, *divmod(i, 3)), drawn[i], rtol=1e-6)
    assert np.isnan(cell(ax, 2, 1)).all()
    assert "seed 3" in ax.get_title()


def test_photographs_are_no_negatives() -> None:
    """Grey 1 is black where it is ink, and white where it is light; a sentence says which."""
    plane = (torch.arange(4.0), torch.arange(3.0), torch.zeros(3, 4))
    vae = VAE(data_dim=6, latent_dim=2, hidden=(5,))
    for pixels, white in (("ink", 0.0), ("light", 1.0)):
        for ax in (
            plot_reconstructions(vae, torch.zeros(2, 6), (2, 3), pixels=pixels),
            plot_samples(vae, (2, 3), num_images=2, pixels=pixels),
            plot_manifold(vae, (2, 3), num_steps=2, pixels=pixels),
            plot_sample_rows({"a": torch.rand(2, 6)}, (2, 3), pixels=pixels),
            plot_picture_rows(torch.rand(1, 2, 6), (2, 3), ["a"], pixels=pixels),
            plot_posterior(*plane, picture=torch.rand(2, 3), pixels=pixels).child_axes[0],
        ):
            (image,) = ax.images
            assert image.get_clim() == (0, 1)
            assert image.cmap(white)[:3] == (1.0, 1.0, 1.0)
            assert image.cmap(1 - white)[:3] == (0.0, 0.0, 0.0)
        assert f"{white:g} is white" in pixels_text(pixels)
        assert f"{1 - white:g} is black" in pixels_text(pixels)


def test_the_manifold_runs_through_the_inverse_normal() -> None:
    ax: Any = plot_manifold(Stub(), SHAPE, num_steps=4)
    quantiles = [NormalDist().inv_cdf((i + 0.5) / 4) for i in range(4)]
    for row in range(4):
        for column in range(4):
            # z_1 rises to the right, z_2 upwards.
            wanted = [quantiles[column], quantiles[3 - row]]
            np.testing.assert_allclose(cell(ax, row, column)[0, :2], wanted, rtol=1e-6)
    ticks = dict(
        zip(ax.get_yticks(), [text.get_text() for text in ax.get_yticklabels()], strict=True)
    )
    assert ticks[max(ticks)] == f"{quantiles[0]:.1f}"  # the lowest picture


def test_the_most_active_latents_are_shown_by_class() -> None:
    spread = torch.tensor([0.1, 3.0, 0.2, 2.0])
    x = spread * torch.linspace(-1, 1, 9)[:, None] ** torch.tensor([1, 1, 1, 3]) + 5
    labels = torch.tensor([0, 2, 0, 2, 0, 2, 0, 2, 2])
    ax: Any = plot_latent(Stub(4), x, labels, label_names=("no", "none", "two"), data="made")
    first, second = ax.collections
    np.testing.assert_allclose(first.get_offsets(), x[labels == 0][:, [1, 3]])
    np.testing.assert_allclose(second.get_offsets(), x[labels == 2][:, [1, 3]])
    assert ax.get_xlabel() == "posterior mean of $z_{2}$ (most active)"
    assert ax.get_ylabel() == "posterior mean of $z_{4}$ (next)"
    assert [text.get_text() for text in ax.texts] == ["no", "two"]
    assert "9 data, 4 latents" in ax.get_title()


def test_codes_and_flows_are_shown_at_their_points() -> None:
    x = torch.rand(9, 15).round()
    point = Autoencoder(15, 2, (4,))
    ax: Any = plot_latent(point, x)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), point.encode(x).detach())
    assert ax.get_xlabel() == "code $z_{1}$"
    flow = VAE(15, 2, (4,), posterior="iaf")
    ax = plot_latent(flow, x)
    located = flow.posterior.location(flow.encoder(x)).detach()
    np.testing.assert_allclose(ax.collections[0].get_offsets(), located)
    assert ax.get_xlabel() == "posterior location of $z_{1}$"


def test_two_latents_keep_their_order_and_one_is_enough() -> None:
    x = torch.tensor([[0.0, 1.0], [0.1, 5.0], [0.2, -3.0]])
    ax: Any = plot_latent(Stub(2), x)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), x)
    ax = plot_latent(Stub(1), x)
    np.testing.assert_allclose(ax.collections[0].get_offsets()[:, 0], x[:, 0])


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda: plot_manifold(Stub(3), SHAPE), "2 latent dimensions, not 3"),
        (lambda: plot_samples(VAE(8, 2, hidden=(3,)), SHAPE), "not images of 3 x 5"),
        (lambda: plot_samples(VAE(15, 2, hidden=(3,)), SHAPE, num_images=0), "num_images must be"),
        (
            lambda: plot_reconstructions(VAE(15, 2, hidden=(3,)), torch.zeros(2, 15), (15,)),
            "not images of 15 pixels",
        ),
    ],
)
def test_what_is_no_picture_is_refused(draw: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        draw()


def test_a_module_without_the_method_is_refused() -> None:
    with pytest.raises(TypeError, match="a Linear has no method encode"):
        plot_latent(nn.Linear(2, 2), torch.zeros(3, 2))


# --- manners


def test_axes_that_are_given_are_used_and_nothing_else_changes() -> None:
    module = VAE(data_dim=15, latent_dim=2, hidden=(4,))
    x = torch.zeros(6, 15)
    settings = dict(mpl.rcParams)
    for draw in (
        lambda ax: plot_bound(history(3), ax),
        lambda ax: plot_evidence(evidence([0.1, 0.9]), ax),
        lambda ax: plot_reconstructions(module, x, SHAPE, ax),
        lambda ax: plot_samples(module, SHAPE, ax, num_images=4),
        lambda ax: plot_manifold(module, SHAPE, ax, num_steps=3),
        lambda ax: plot_latent(module, x, None, ax),
    ):
        ax = Figure().add_subplot()
        assert draw(ax) is ax
        own = draw(None)
        own.figure.canvas.draw()
        assert own.figure is not ax.figure
    assert dict(mpl.rcParams) == settings
    from matplotlib import pyplot as plt

    assert plt.get_fignums() == []


def comparison(names: list[str]) -> Result:
    """As much of a comparison of estimators as its figures read."""
    dims = ("estimator", "num_particles", "parameter")
    values = np.linspace(1.0, 2.0, 2 * len(names)).reshape(len(names), 2, 1)
    pure = label(unit="none", reduction="none", bound="none")
    variables: dict[str, Any] = {
        name: (dims, values, {**pure, "noise_floor": 0.1}) for name in ("snr", "variance")
    }
    variables |= {f"{name}_se": (dims, 0.01 * values, {}) for name in ("snr", "variance")}
    variables["seconds"] = (dims[:2], values[..., 0], pure)
    variables["passes"] = (dims[:2], values[..., 0], pure)
    variables["verdict"] = (dims, np.full(values.shape, "no bias seen"), {})
    coords = {"estimator": names, "num_particles": [1, 8], "parameter": ["guide"]}
    return make_result(variables, function="f", config={}, seed=0, data_sha256=None, coords=coords)


def test_an_estimator_has_one_colour_in_every_panel() -> None:
    def colours(ax: Any) -> dict[str, Any]:
        handles, texts = ax.get_legend_handles_labels()
        named = zip(handles, (text.split(":")[0] for text in texts), strict=True)
        return {name: handle.get_color() for handle, name in named if name != "noise floor"}

    many = ["PathwiseELBO", "DReG", "VIMCO", "mine", "ReweightedWakeSleep"]
    few = ["VIMCO", "Renyi(alpha=0.3)", "DReG"]
    all_of_them = [
        colours(plot(comparison(names)))
        for plot in (plot_estimator_cost, plot_signal_to_noise)
        for names in (many, few)
    ]
    for found in all_of_them[1:]:
        shared = set(found) & set(all_of_them[0])
        assert {name: found[name] for name in shared} == {n: all_of_them[0][n] for n in shared}
    assert len(set(all_of_them[0].values())) == len(many)
