"""Figures of posteriors show the numbers they are given."""

import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pyro_vae import LinearGaussian, posterior_quality
from pyro_vae.plots import (
    plot_calibration,
    plot_coverage,
    plot_khat,
    plot_khat_by_class,
    plot_khat_plane,
    plot_posterior,
    plot_trust,
    plot_worst,
)
from pyro_vae.results import Result, label, make_result

KHAT = [0.1, 0.5, 0.66, 0.67, 1.2, -0.4, math.nan]  # the threshold at 1000 draws is 2/3


def quality(khat: list[float] | None = None, latents: int = 2) -> Result:
    values = KHAT if khat is None else khat
    size = len(values)
    pure = label(unit="none", reduction="per datum", bound="none", num_particles=1000)
    nats = label(unit="nats", reduction="per datum", bound="lower", num_particles=1000)
    described = {**nats, "description": "the divergence"}
    kl = [0.1 * (i + 1) for i in range(size)]
    return make_result(
        {
            "khat": ("datum", values, pure),
            "kl_guide_posterior": ("datum", kl, described),
            "mean": (
                ("datum", "latent"),
                np.arange(float(size * latents)).reshape(size, -1),
                pure,
            ),
            "trust_guide": ("datum", [i < 2 for i in range(size)], {}),
            "trust_weights": ("datum", [i < 3 for i in range(size)], {}),
            "reason": ("datum", [f"reason {i}" for i in range(size)], {}),
        },
        function="posterior_quality",
        config={},
        seed=0,
        data_sha256=None,
        coords={"latent": [f"z[{i}]" for i in range(latents)], "datum": range(size)},
    )


def simulated(ranks: np.ndarray, draws: int) -> Result:
    """Ranks `[simulations, 2]` with their ECDF by counting."""
    steps = np.arange(draws + 1)
    shares = (ranks[..., None] <= steps).mean(0)
    pure = label(unit="none", bound="none", reduction="none")
    variables: dict[str, Any] = {
        "ranks": (("simulation", "latent"), ranks, {}),
        "ecdf": (("latent", "rank"), shares, pure),
        "log_joint_ecdf": ("rank", shares[0] ** 2, pure),
        "tarp_ecdf": ("rank", shares[1] ** 2, pure),
        "ecdf_lower": ("rank", (steps + 1) / (draws + 1) - 0.1, pure),
        "ecdf_upper": ("rank", (steps + 1) / (draws + 1) + 0.2, pure),
    }
    return make_result(
        variables,
        function="calibrate",
        config={},
        seed=0,
        data_sha256=None,
        coords={"latent": ["a", "b"], "rank": steps},
    )


# --- k-hat


def test_khat_is_counted_on_both_sides_of_its_threshold() -> None:
    ax: Any = plot_khat(quality(), data="digits")
    good, bad = ax.containers
    assert [sum(bar.get_height() for bar in part) for part in (good, bad)] == [4, 2]
    threshold = 1 - 1 / math.log10(1000)
    assert max(bar.get_x() + bar.get_width() for bar in good if bar.get_height()) <= threshold
    assert min(bar.get_x() for bar in bad if bar.get_height()) == pytest.approx(threshold)
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {
        "weights may be used, by k-hat: 4",
        "weights may not, by k-hat: 2",
        "threshold 0.67",
        "no finite k-hat: 1",
    }
    assert "digits, 7 data, 1000 draws each" in ax.get_title()


def test_khat_by_class_has_a_dot_for_each_datum_and_a_median() -> None:
    labels = torch.tensor([4, 4, 4, 9, 9, 9, 9])
    ax: Any = plot_khat_by_class(quality(), labels, label_names=list("abcdefghij"))
    heights = sorted(y for part in ax.collections for y in part.get_offsets()[:, 1])
    assert heights == pytest.approx([-0.4, 0.1, 0.5, 0.66, 0.67, 1.2])
    bars = [line.get_ydata()[0] for line in ax.get_lines()]
    assert bars == pytest.approx([0.5, 0.67, 2 / 3])  # two medians, the threshold
    assert [text.get_text() for text in ax.get_xticklabels()] == ["e", "j"]
    with pytest.raises(ValueError, match="6 labels for 7 data"):
        plot_khat_by_class(quality(), labels[:6])


def test_the_plane_parts_good_from_bad() -> None:
    given = quality()
    ax: Any = plot_khat_plane(given)
    good, bad = ax.collections
    np.testing.assert_array_equal(good.get_offsets(), given["mean"].values[[0, 1, 2, 5]])
    np.testing.assert_array_equal(bad.get_offsets(), given["mean"].values[[3, 4, 6]])
    with pytest.raises(ValueError, match="2 latents, not 3"):
        plot_khat_plane(quality(latents=3))


@pytest.mark.parametrize("draw", [plot_khat, plot_khat_plane])
def test_a_result_without_khat_is_refused(draw: Any) -> None:
    with pytest.raises(ValueError, match="no k-hat for each datum"):
        draw(quality().drop_vars("khat"))


# --- one posterior


def grid() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A standard normal about (1, -1), on a grid of unequal sides."""
    across, up = torch.linspace(-4.0, 6.0, 161), torch.linspace(-5.0, 3.0, 121)
    log_density = -((across - 1) ** 2 + (up[:, None] + 1) ** 2) / 2 + 17.0
    return across, up, log_density


def test_contours_hold_the_shares_that_they_say() -> None:
    across, up, log_density = grid()
    ax: Any = plot_posterior(across, up, log_density, log_density - 40)
    filled, lines = ax.collections
    for part in (filled, lines):
        outer = np.concatenate(part.get_paths()[0].to_polygons())
        radius = np.hypot(outer[:, 0] - 1, outer[:, 1] + 1).max()
        assert radius == pytest.approx(math.sqrt(-2 * math.log(0.1)), abs=0.03)
    inner = np.concatenate(lines.get_paths()[1].to_polygons())
    radius = np.hypot(inner[:, 0] - 1, inner[:, 1] + 1)
    assert radius == pytest.approx(math.sqrt(-2 * math.log(0.5)), abs=0.03)


def test_draws_and_picture_are_shown() -> None:
    across, up, log_density = grid()
    draws = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.0, 0.5]])
    # Mass sits in the lower left corner, so the picture must go elsewhere.
    skew = log_density - 4 * (across + up[:, None])
    picture = torch.eye(3)
    ax: Any = plot_posterior(across, up, skew, draws=draws, picture=picture, title="a title")
    (points,) = ax.get_lines()
    np.testing.assert_array_equal(points.get_xydata(), draws)
    (inset,) = ax.child_axes
    np.testing.assert_array_equal(inset.get_images()[0].get_array(), picture)
    box = inset.get_position()
    whole = ax.get_position()
    assert (box.x0, box.y0) != (whole.x0, whole.y0)
    assert ax.get_title() == "a title"
    said = [text.get_text() for text in ax.get_legend().get_texts()]
    assert said == ["exact posterior, 50 and 90 %", "HMC draws"]
    assert plot_posterior(across, up, log_density, legend=False).get_legend() is None


def test_a_density_that_is_nowhere_is_refused() -> None:
    across, up, log_density = grid()
    with pytest.raises(ValueError, match="zero everywhere"):
        plot_posterior(across, up, torch.full_like(log_density, -math.inf))


# --- calibration


def test_the_ecdf_is_drawn_less_the_uniform_one() -> None:
    ranks = np.array([[0, 4], [1, 4], [3, 2]])
    given = simulated(ranks, 4)
    ax: Any = plot_calibration(given, title="a guide")
    lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    np.testing.assert_allclose(lines["a"], [1 / 3 - 0.2, 2 / 3 - 0.4, 2 / 3 - 0.6, 0.2, 0])
    np.testing.assert_allclose(lines["b"], [-0.2, -0.4, 1 / 3 - 0.6, 1 / 3 - 0.8, 0])
    assert {"log p(x, z)", "TARP"} < set(lines)
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((-0.1, 0.2))
    assert ax.get_title() == "a guide"


def test_coverage_of_a_narrow_guide_is_below_the_level() -> None:
    # Ranks 0 and 4 alone: intervals of level 0.5 hold none of them, ranks 2 alone: all.
    narrow = simulated(np.array([[0, 2], [4, 2]] * 5), 4)
    ax: Any = plot_coverage({"narrow": narrow}, latent="a")
    line = ax.get_lines()[0]
    assert line.get_label() == "narrow"
    at = np.interp(0.5, line.get_xdata(), line.get_ydata())
    assert at == pytest.approx(-0.5)
    ax = plot_coverage({"wide": narrow}, latent="b")
    line = ax.get_lines()[0]
    assert np.interp(0.5, line.get_xdata(), line.get_ydata()) == pytest.approx(0.5)
    assert "b" in ax.get_title()


def test_what_was_not_simulated_is_refused() -> None:
    with pytest.raises(ValueError, match="num_simulations"):
        plot_calibration(quality())
    with pytest.raises(ValueError, match="num_simulations"):
        plot_coverage({"guide": quality()})
    with pytest.raises(ValueError, match="at least one"):
        plot_coverage({})


# --- all of it


def test_bars_are_the_shares_of_the_data() -> None:
    ax: Any = plot_trust({"first": quality(), "second": quality([0.1, 0.2, 0.3, 0.4])})
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([2 / 7, 2 / 4, 3 / 7, 3 / 4])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["first", "second"]
    assert ax.yaxis_inverted()


def test_the_worst_come_first_with_their_reasons() -> None:
    x = torch.arange(42.0).reshape(7, 6) / 42
    figure = plot_worst(quality(), x, (2, 3), by="kl_guide_posterior", count=3)
    shown = [np.asarray(ax.get_images()[0].get_array()) for ax in figure.axes if ax.get_images()]
    np.testing.assert_allclose(np.stack(shown), x[[6, 5, 4]].reshape(3, 2, 3))
    said = [[text.get_text() for text in ax.texts] for ax in figure.axes if ax.texts]
    assert [reason for _, reason in said] == ["reason 6", "reason 5", "reason 4"]
    assert said[1][0] == "datum 5: k-hat -0.40, KL(q || p) 0.60 nats"
    assert figure.get_suptitle() == "The worst posteriors, by the divergence"
    with pytest.raises(ValueError, match="7 data and x 6"):
        plot_worst(quality(), x[:6], (2, 3))


def test_they_take_what_posterior_quality_returns() -> None:
    pair = LinearGaussian(data_dim=6, latent_dim=2)
    x = pair.sample(8)
    found = posterior_quality(
        pair.model,
        pair.exact_guide,
        x,
        num_particles=50,
        num_simulations=60,
        checks=(),
        progress=False,
    )
    settings = dict(mpl.rcParams)
    for draw in (plot_khat, plot_khat_plane, plot_calibration):
        own = Figure().add_subplot()
        assert draw(found, own) is own
    plot_coverage({"exact": found})
    plot_trust({"exact": found})
    plot_worst(found, x, (2, 3)).canvas.draw()
    assert dict(mpl.rcParams) == settings
