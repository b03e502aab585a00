"""Figures of latent spaces show the numbers they are given, and change nothing else."""

from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.extras.latents import attribute_effect, compression, feature_quality, shortest_path
from pyro_vae.plots import (
    plot_attribute_effects,
    plot_compression,
    plot_feature_quality,
    plot_paths,
    plot_picture_rows,
    plot_units,
)
from pyro_vae.results import Result


def paraboloid(z: Tensor) -> Tensor:
    return torch.cat([z, z.square()], dim=-1)


def paths(latents: int = 2) -> Result:
    return shortest_path(paraboloid, torch.randn(3, latents), torch.randn(3, latents), 7)


def effects() -> dict[str, Result]:
    codes = torch.randn(5, 2)
    return {
        name: attribute_effect(
            paraboloid, codes, torch.ones(2), lambda x: x[:, 0].sigmoid(), num_controls=3
        )
        for name in ("smile", "hat")
    }


def qualities() -> Result:
    codes = [(np.random.default_rng(i).normal(size=(30, 2 + i)),) * 2 for i in range(2)]
    labels = np.arange(30) % 3
    return feature_quality(
        {"pixels": codes[:1], "codes": codes[1:]}, labels, labels, num_bootstrap=5
    )


def losses() -> Result:
    own, other = torch.randn(8, 3), 4 + torch.randn(9, 3)
    codes = {"tenth": lambda x: 0.9 * x, "half": lambda x: 0.5 * x}
    return compression(codes, {"own": own, "other": other})


def test_rows_of_pictures_stand_by_their_names() -> None:
    rows = torch.rand(2, 4, 15)
    ax: Any = plot_picture_rows(rows, (3, 5), ["up", "down"], columns=["a", "b", "c", "d"])
    (image,) = ax.get_images()
    whole = np.ma.filled(image.get_array(), np.nan)
    assert whole.shape == (2 * 4 - 1, 4 * 6 - 1)  # a gap of one pixel
    np.testing.assert_allclose(whole[4:7, 6:11], rows[1, 1].reshape(3, 5), rtol=1e-6)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["up", "down"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c", "d"]
    assert [0 <= t < 3 for t in ax.get_yticks()] == [True, False]
    with pytest.raises(ValueError, match="one for each row"):
        plot_picture_rows(rows, (3, 5), ["up"])
    with pytest.raises(ValueError, match="not images of 4 x 4"):
        plot_picture_rows(rows, (4, 4), ["up", "down"])


def test_both_paths_of_each_pair_are_drawn() -> None:
    found, codes = paths(), torch.randn(20, 2)
    ax: Any = plot_paths(paraboloid, codes, found, torch.arange(20) % 2)
    lines = [line for line in ax.get_lines() if line.get_linestyle() == "--"]
    assert len(lines) == 3
    for i, line in enumerate(lines):
        np.testing.assert_array_equal(line.get_xydata(), found["straight_points"].values[i])
    drawn = [line.get_xydata() for line in ax.get_lines()]
    for points in found["points"].values:
        assert any(np.array_equal(points, line) for line in drawn)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["straight", "shortest found"]
    left, _, _, top = ax.get_images()[0].get_extent()
    assert left < float(codes[:, 0].min())
    assert top > float(codes[:, 1].max())
    with pytest.raises(ValueError, match="2 latents, not 3"):
        plot_paths(paraboloid, torch.randn(4, 3), paths(3))


def test_the_vector_is_solid_and_its_control_dotted() -> None:
    found = effects()
    ax: Any = plot_attribute_effects(found)
    shown = {c.get_label(): c.lines[0] for c in ax.containers}
    assert list(shown) == ["smile", "smile: other directions", "hat", "hat: other directions"]
    for name, result in found.items():
        np.testing.assert_array_equal(shown[name].get_ydata(), result["probability"])
        control = shown[f"{name}: other directions"]
        np.testing.assert_array_equal(control.get_ydata(), result["control"])
        assert control.get_linestyle() == ":"
    assert "two standard errors" in (plot_attribute_effects.__doc__ or "")


def test_collapsed_units_have_a_sign_of_their_own() -> None:
    activity, effect = np.array([0.9, -0.002, 0.5, 0.005]), np.array([0.2, 0.0, 0.1, 0.001])
    ax: Any = plot_units(activity, effect)
    active, collapsed = ax.collections[:2]
    np.testing.assert_allclose(active.get_offsets(), [[0.9, 0.2], [0.5, 0.1]])
    np.testing.assert_allclose(collapsed.get_offsets(), [[1e-4, 1e-4], [0.005, 0.001]])
    assert {t.get_text(): t.xy for t in ax.texts}["$z_{3}$"] == (0.5, 0.1)
    assert len(ax.texts) == 4
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "active: 2 units",
        "collapsed: 2 units",
    ]


def test_every_kind_of_code_has_a_row() -> None:
    result = qualities()
    ax: Any = plot_feature_quality(result)
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "pixels (2 numbers)",
        "codes (3 numbers)",
    ]
    probe, clusters = (c.lines[0] for c in ax.containers)
    np.testing.assert_array_equal(probe.get_xdata(), result["probe_accuracy"])
    np.testing.assert_array_equal(clusters.get_xdata(), result["cluster_accuracy"])


def test_every_cell_has_its_percentage() -> None:
    result = losses()
    ax: Any = plot_compression(result)
    wanted = [f"{100 * v:.1f} %" for v in result["relative_error"].values.ravel()]
    assert [t.get_text() for t in ax.texts] == wanted
    assert [t.get_text() for t in ax.get_xticklabels()] == ["own", "other"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["tenth", "half"]


def test_axes_that_are_given_are_used_and_nothing_else_changes() -> None:
    found, attributes, quality, lost = paths(), effects(), qualities(), losses()
    settings = dict(mpl.rcParams)
    for draw in (
        lambda ax: plot_picture_rows(torch.rand(2, 3, 6), (2, 3), ["a", "b"], ax),
        lambda ax: plot_paths(paraboloid, torch.randn(9, 2), found, None, ax),
        lambda ax: plot_attribute_effects(attributes, ax),
        lambda ax: plot_units(np.array([1.0, 0.0]), np.array([1.0, 0.0]), ax),
        lambda ax: plot_feature_quality(quality, ax),
        lambda ax: plot_compression(lost, ax),
    ):
        ax = Figure().add_subplot()
        assert draw(ax) is ax
        own = draw(None)
        own.figure.canvas.draw()
        assert own.figure is not ax.figure
    assert dict(mpl.rcParams) == settings
