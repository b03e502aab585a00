"""Figures of latent spaces: paths, attributes, units, and how well codes serve.

In the manner of `figures`: every function takes what it shows and, if wanted, the `Axes` to
draw on, and returns the `Axes`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, PercentFormatter
from torch import Tensor

from pyro_vae.extras.latents import Decoder, magnification
from pyro_vae.plots.images import _grid, _images, _show
from pyro_vae.plots.style import (
    _BLUE,
    _CLASSES,
    _GREY,
    _MARKERS,
    _ORANGE,
    _SQUARE,
    _WIDE,
    _axes,
    _sign,
)
from pyro_vae.results import Result

__all__ = [
    "plot_attribute_effects",
    "plot_compression",
    "plot_feature_quality",
    "plot_paths",
    "plot_picture_rows",
    "plot_units",
]

_GRID = 80  # points along each side of the magnification's background
_LEAST = 1e-4  # an activity or effect that is less (an estimate may be negative) is shown there
_ERRORS = (-2.0, math.log10(3.0))  # ends of the colours of relative errors, log10


# --- pictures -------------------------------------------------------------------------------------


def plot_picture_rows(
    rows: Float[Tensor, "down across pixels"],
    image_shape: Sequence[int],
    names: Sequence[str],
    ax: Axes | None = None,
    *,
    columns: Sequence[str] = (),
    title: str = "",
    pixels: str = "ink",
) -> Axes:
    """Shows named rows of pictures.

    Args:
        rows: Pictures, from top to bottom and from left to right.
        image_shape: Rows and columns of a picture.
        names: A name for each row, at its left.
        ax: Where to draw; a new figure if None.
        columns: Names under the pictures of the last row; empty for none.
        title: The title.
        pixels: What a pixel counts, see `Dataset`: "ink" is drawn black, "light" white.

    Raises:
        ValueError: If there are not as many names as rows, or rows are no such pictures.
    """
    down, across = rows.shape[:2]
    if len(names) != down or (columns and len(columns) != across):
        raise ValueError(
            f"{down} rows of {across} pictures have {len(names)} and {len(columns)} names: give "
            "one for each row, and one or none for each column"
        )
    images = _images(rows.flatten(0, 1), image_shape)
    size = (0.62 * across + 1.6, 0.62 * down * image_shape[0] / image_shape[1] + 0.7)
    ax = _show(ax, images.reshape(down, across, *images.shape[1:]), size, pixels)
    _, height, width = _grid(image_shape)
    ax.set_yticks([(i + 0.5) * height - 0.5 for i in range(down)], list(names), fontsize="small")
    ax.set_xticks(
        [(i + 0.5) * width - 0.5 for i in range(len(columns))], list(columns), fontsize="small"
    )
    ax.set_title(title, fontsize="medium")
    return ax


# --- paths ----------------------------------------------------------------------------------------


def plot_paths(
    decoder: Decoder,
    codes: Float[Tensor, "data latent"],
    paths: Result,
    labels: Int64[Tensor, " data"] | None = None,
    ax: Axes | None = None,
    *,
    title: str = "Straight and shortest paths",
) -> Axes:
    """Shows paths of two latents over the codes and the decoder's magnification.

    Dark is where a step of the code changes the picture much: shortest paths (solid) bend around
    it, straight ones (dashed) do not. A pair has its number at its start.

    Args:
        decoder: The decoder, of two latents.
        codes: Codes of data, for orientation.
        paths: From `shortest_path` with this decoder.
        labels: The classes of the codes, or None.
        ax: Where to draw; a new figure if None.
        title: The title.

    Returns:
        The axes, with two lines for each pair.

    Raises:
        ValueError: If there are not two latents.
    """
    if codes.shape[1] != 2 or paths.sizes["latent"] != 2:
        raise ValueError(f"paths are drawn for 2 latents, not {codes.shape[1]}")
    ax = _axes(ax, _SQUARE)
    corners = torch.cat([codes, torch.as_tensor(paths["points"].values).reshape(-1, 2).to(codes)])
    low, high = corners.amin(0), corners.amax(0)
    margin = 0.06 * (high - low)
    (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
    across = torch.linspace(left, right, _GRID).to(codes)
    up = torch.linspace(bottom, top, _GRID).to(codes)
    z = torch.stack(torch.meshgrid(across, up, indexing="xy"), dim=-1).reshape(-1, 2)
    volume = magnification(decoder, z).detach().reshape(_GRID, _GRID)
    picture = ax.imshow(
        volume.log10().clamp_min(float(volume.max().log10()) - 3).numpy(),
        extent=(left, right, bottom, top),
        origin="lower",
        cmap="Greys",
        alpha=0.75,
        aspect="auto",
        interpolation="bilinear",
    )
    ax.figure.colorbar(picture, ax=ax, label="log10 of the decoder's magnification", pad=0.02)
    classes = torch.zeros(len(codes), dtype=torch.int64) if labels is None else labels
    for k in classes.unique().tolist():
        chosen = codes[classes == k].numpy()
        look: dict[str, Any] = {"s": 9, "alpha": 0.7, "linewidths": 0}
        marker = _MARKERS[k % len(_MARKERS)]
        ax.scatter(*chosen.T, color=_CLASSES[k % len(_CLASSES)], marker=marker, **look)
    for i in range(paths.sizes["pair"]):
        for name, style, colour in (("straight_points", "--", _ORANGE), ("points", "-", _BLUE)):
            line = paths[name].values[i]
            text = {"points": "shortest found", "straight_points": "straight"}[name]
            ax.plot(*line.T, "-", color="white", lw=4, alpha=0.9, zorder=3)
            ax.plot(*line.T, style, color=colour, lw=2, label=None if i else text, zorder=4)
        start, end = paths["points"].values[i][[0, -1]]
        look = {"fontweight": "bold", "ha": "center", "va": "center", "zorder": 6}
        ax.plot(*np.stack([start, end]).T, "o", color="white", mec="black", ms=11, zorder=5)
        for x, y in (start, end):
            ax.text(float(x), float(y), str(i + 1), fontsize="small", **look)
    ax.set_xlabel("$z_1$")
    ax.set_ylabel("$z_2$")
    ax.set_title(title, fontsize="medium")
    ax.legend(fontsize="small", loc="upper left")
    return ax


# --- attributes -----------------------------------------------------------------------------------


def plot_attribute_effects(effects: Mapping[str, Result], ax: Axes | None = None) -> Axes:
    """Plots what a classifier says after an attribute's vector was added, against its strength.

    Solid lines add the vector, dotted ones with hollow markers vectors of equal length in other
    directions. Bars are two standard errors to either side.

    Args:
        effects: From `attribute_effect`, by the attribute's name.
        ax: Where to draw; a new figure if None.
    """
    ax = _axes(ax, _WIDE)
    for i, (name, found) in enumerate(effects.items()):
        colour, marker = _sign(i)
        for column, style, fill in (("probability", "-", colour), ("control", ":", "white")):
            ax.errorbar(
                found["strength"].values,
                found[column].values,
                yerr=2 * found[f"{column}_se"].values,
                ls=style,
                marker=marker,
                color=colour,
                markerfacecolor=fill,
                ms=6,
                lw=1.5,
                label=name if column == "probability" else f"{name}: other directions",
            )
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlabel("how many times the vector was added")
    ax.set_ylabel("probability of the attribute, by a classifier")
    ax.set_title("What attribute vectors do", fontsize="medium")
    ax.grid(alpha=0.25, lw=0.6)
    ax.legend(
        fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2
    )
    return ax


# --- units ----------------------------------------------------------------------------------------


def plot_units(
    activity: Float[np.ndarray, " unit"],
    effect: Float[np.ndarray, " unit"],
    ax: Axes | None = None,
    *,
    active_above: float = 1e-2,
) -> Axes:
    """Plots how much each latent unit does against how much the data move it.

    Args:
        activity: Variance over data of the posterior mean, from `elbo_surgery`.
        effect: From `unit_effects`. What is below 0.0001 (an estimate of the activity may be
            negative) is drawn there, for both.
        ax: Where to draw; a new figure if None.
        active_above: Where a unit counts as active.

    Returns:
        The axes; the first collection holds the active units, the second the collapsed ones.
    """
    ax = _axes(ax, _SQUARE)
    across, up = np.maximum(activity, _LEAST), np.maximum(effect, _LEAST)
    active = activity > active_above
    for chosen, colour, marker, text in (
        (active, _BLUE, "o", "active"),
        (~active, _ORANGE, "X", "collapsed"),
    ):
        look: dict[str, Any] = {"color": colour, "marker": marker, "s": 45, "zorder": 3}
        ax.scatter(across[chosen], up[chosen], label=f"{text}: {int(chosen.sum())} units", **look)
    for place, i in enumerate(np.argsort(up)):  # names at alternate sides stand apart
        side = 1 if place % 2 else -1
        ax.annotate(
            f"$z_{{{i + 1}}}$",
            (across[i], up[i]),
            xytext=(7 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize="small",
        )
    ax.axvline(active_above, color=_GREY, lw=1, ls="--")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(_LEAST / 2, 4 * float(across.max()))
    ax.set_xlabel("activity: variance over data of the posterior mean")
    ax.set_ylabel("effect: standard deviation of a pixel while the unit moves")
    ax.set_title("What each unit does", fontsize="medium")
    ax.grid(alpha=0.25, lw=0.6)
    ax.legend(fontsize="small", loc="upper left")
    return ax


# --- tables as figures ----------------------------------------------------------------------------


def plot_feature_quality(result: Result, ax: Axes | None = None) -> Axes:
    """Plots what a linear classifier and k-means find in each kind of code.

    Args:
        result: From `feature_quality`.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes, with two rows of points; bars are two standard errors to either side.
    """
    kinds = result["features"].values
    ax = _axes(ax, (7.0, 0.45 * len(kinds) + 1.6))
    places = np.arange(len(kinds))
    for name, colour, marker, shift, text in (
        ("probe_accuracy", _BLUE, "o", -0.12, "linear classifier"),
        ("cluster_accuracy", _ORANGE, "D", 0.12, "k-means, matched with classes"),
    ):
        look: dict[str, Any] = {"fmt": marker, "color": colour, "ms": 6, "capsize": 3}
        errors = 2 * result[f"{name}_se"].values
        ax.errorbar(result[name].values, places + shift, xerr=errors, label=text, **look)
    sizes = result["code_dim"].values
    ax.set_yticks(places, [f"{k} ({s} numbers)" for k, s in zip(kinds, sizes, strict=True)])
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_xlabel("share of test data named rightly")
    ax.set_title("How well codes serve", fontsize="medium")
    ax.grid(alpha=0.25, lw=0.6)
    ax.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return ax


def plot_compression(result: Result, ax: Axes | None = None) -> Axes:
    """Plots the relative error of each code on each distribution, as a table of colours.

    Args:
        result: From `compression`.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes; each cell has its number in percent of the distribution's variance.
    """
    errors = result["relative_error"].values
    codes, data = result["code"].values, result["distribution"].values
    ax = _axes(ax, (1.75 * len(data) + 2.6, 0.5 * len(codes) + 1.5))
    shown, (low, high) = np.log10(errors), _ERRORS
    ax.imshow(shown, cmap="cividis_r", vmin=low, vmax=high, aspect="auto")
    for i, j in np.ndindex(errors.shape):
        colour = "white" if shown[i, j] > (low + high) / 2 else "black"
        ax.text(j, i, f"{100 * errors[i, j]:.1f} %", ha="center", va="center", color=colour)
    ax.set_xticks(range(len(data)), [str(name) for name in data])
    ax.set_yticks(range(len(codes)), [str(name) for name in codes])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.tick_params(length=0)
    ax.set_xlabel("tested on")
    ax.set_title(
        "Squared error, in percent of the variance of what it was tested on", fontsize="medium"
    )
    return ax
