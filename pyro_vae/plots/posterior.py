"""Figures of how good posteriors are: k-hat, draws beside references, calibration, worst data.

In the manner of `figures`: most functions take what they show and, if wanted, the `Axes` to
draw on, and return the `Axes`.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from pyro_vae.diagnostics.calibration import coverage
from pyro_vae.diagnostics.posterior import worst_data
from pyro_vae.plots.images import _images, _look_of
from pyro_vae.plots.style import _BLUE, _GREY, _ORANGE, _SQUARE, _WIDE, _axes, _legend_below, _sign
from pyro_vae.results import Result

__all__ = ["plot_calibration", "plot_coverage", "plot_posterior", "plot_trust", "plot_worst"]

_LEVELS = np.linspace(0.02, 0.98, 49)  # of central intervals
_SHARES = (0.5, 0.9)  # of probability inside the contours
_LINE_STYLES: tuple[Any, ...] = ("-", "--", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)))


# --- one posterior --------------------------------------------------------------------------------


def plot_posterior(
    across: Float[Tensor, " columns"],
    up: Float[Tensor, " rows"],
    log_joint: Float[Tensor, "rows columns"],
    log_guide: Float[Tensor, "rows columns"] | None = None,
    draws: Float[Tensor, "draws 2"] | None = None,
    ax: Axes | None = None,
    *,
    title: str = "",
    picture: Float[Tensor, "rows_of columns_of"] | None = None,
    pixels: str = "ink",
    legend: bool = True,
) -> Axes:
    """Shows the exact posterior of two latents on a grid, q's contours and draws of a reference.

    Contours enclose 50 % and 90 % of the probability on the grid: filled for the posterior, lines
    for q, each normalised by its own sum over the grid.

    Args:
        across: The grid's values of the first latent, evenly spaced.
        up: Those of the second.
        log_joint: log p(x, z) on the grid, up to a constant.
        log_guide: log q(z | x) there.
        draws: Such as those of Hamiltonian Monte Carlo.
        ax: Where to draw; a new figure if None.
        title: The title.
        picture: The datum as an image, for a corner.
        pixels: What a pixel counts, see `Dataset`: "ink" is drawn black, "light" white.
        legend: Whether to say what is what.

    Raises:
        ValueError: If a density is zero on the whole grid, or not a number.
    """
    ax = _axes(ax, _SQUARE)
    x, y = across.cpu().numpy(), up.cpu().numpy()
    exact = _normalised(log_joint)
    shades = ("#C6DBEF", "#6BAED6")
    ax.contourf(x, y, exact, [*_heights(exact), np.inf], colors=shades, zorder=1)
    handles: list[Line2D | Patch] = [Patch(color=shades[1], label="exact posterior, 50 and 90 %")]
    shown = exact
    if log_guide is not None:
        guide = _normalised(log_guide)
        shown = exact + guide
        ax.contour(
            x,
            y,
            guide,
            _heights(guide),
            colors=_ORANGE,
            linestyles=("--", "-"),
            linewidths=1.6,
            zorder=3,
        )
        handles.append(Line2D([], [], color=_ORANGE, label="q, 50 (solid) and 90 % (dashed)"))
    if draws is not None:
        ax.plot(*draws.cpu().numpy().T, ".", ms=2.5, color="black", alpha=0.55, zorder=2)
        handles.append(Line2D([], [], color="black", marker=".", ls="", label="HMC draws"))
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(y[0], y[-1])
    ax.set_title(title, fontsize="medium")
    if picture is not None:
        inset = ax.inset_axes(_emptiest_corner(shown))
        inset.imshow(picture.cpu().numpy(), **_look_of(pixels))
        inset.set_xticks([])
        inset.set_yticks([])
    if legend:
        _legend_for(ax, handles)
    return ax


def _legend_for(ax: Axes, handles: Sequence[Line2D | Patch]) -> None:
    ax.legend(
        handles=list(handles),
        fontsize="small",
        loc="upper center",
        bbox_to_anchor=(0.5, -0.08),
        frameon=False,
    )


def _normalised(log_density: Tensor) -> np.ndarray:
    """Probabilities of the cells of a grid."""
    flat = log_density.detach().cpu().double().flatten()
    shares = torch.softmax(flat, 0)
    if not bool(shares.isfinite().all()):
        raise ValueError("a density on the grid is zero everywhere or nan: choose another grid")
    return shares.reshape(log_density.shape).numpy()


def _heights(shares: np.ndarray) -> list[float]:
    """Heights above which the largest and the smallest of `_SHARES` lie, rising."""
    ordered = np.sort(shares.ravel())[::-1]
    inside = ordered.cumsum()
    found = [float(ordered[min(int((inside < s).sum()), len(ordered) - 1)]) for s in _SHARES[::-1]]
    # Where one cell holds nearly all, the contours must still differ.
    return [min(found[0], 0.999 * found[1]), found[1]]


def _emptiest_corner(shares: np.ndarray) -> tuple[float, float, float, float]:
    """Bounds, in parts of the axes, of the corner with the least probability."""
    rows, columns = (math.ceil(0.32 * n) for n in shares.shape)
    corners = {
        (0.7, 0.7): shares[-rows:, -columns:],
        (0.02, 0.7): shares[-rows:, :columns],
        (0.7, 0.02): shares[:rows, -columns:],
        (0.02, 0.02): shares[:rows, :columns],
    }
    left, bottom = min(corners, key=lambda place: float(corners[place].sum()))
    return (left, bottom, 0.28, 0.28)


# --- calibration ----------------------------------------------------------------------------------


def plot_calibration(
    result: Result, ax: Axes | None = None, *, title: str = "", legend: bool = True
) -> Axes:
    """Plots the ECDFs of ranks less that of uniform ones, with their simultaneous 95 % band.

    A line of a calibrated guide stays inside the band, with probability 95 %. One that is above it
    first and below it then has too many extreme ranks: the guide is too narrow. One that is above
    all along: the guide is too high.

    Args:
        result: From `posterior_quality` with simulations, or from `calibrate`.
        ax: Where to draw; a new figure if None.
        title: The title.
        legend: Whether to name the lines.

    Returns:
        The axes, with a line for each latent, one for log p(x, z) and one for TARP.

    Raises:
        ValueError: If nothing was simulated.
    """
    _check_simulated(result)
    ax = _axes(ax, _WIDE)
    ranks = result["rank"].values
    uniform = (ranks + 1) / len(ranks)
    lower, upper = (result[f"ecdf_{end}"].values - uniform for end in ("lower", "upper"))
    band = ax.fill_between(uniform, lower, upper, step="mid", color=_GREY, alpha=0.2, lw=0)
    band.set_label("95 % band")
    names = [str(name) for name in result["latent"].values]
    lines = [
        (name, result["ecdf"].sel(latent=name).values, _LINE_STYLES[i % 2], _sign(i)[0])
        for i, name in enumerate(names)
    ]
    lines.append(("log p(x, z)", result["log_joint_ecdf"].values, "-.", "black"))
    lines.append(("TARP", result["tarp_ecdf"].values, ":", "black"))
    for name, values, style, colour in lines:
        ax.plot(uniform, values - uniform, ls=style, color=colour, lw=1.6, label=name)
    ax.axhline(0, color="black", lw=0.6)
    ax.set_xlabel("rank, as a share")
    ax.set_ylabel("ECDF - uniform")
    ax.set_title(title or "Ranks under the model's own data", fontsize="medium")
    ax.grid(alpha=0.25, lw=0.6)
    if legend:
        _legend_below(ax)
    return ax


def plot_coverage(
    results: Mapping[str, Result],
    ax: Axes | None = None,
    *,
    latent: str | None = None,
    legend: bool = True,
) -> Axes:
    """Plots by how much central intervals of q hold the truth too often or too rarely.

    The grey band is two standard errors of an exact guide, at each level by itself.

    Args:
        results: By guide, from `posterior_quality` with as many simulations each.
        ax: Where to draw; a new figure if None.
        latent: Which latent; the first if None.
        legend: Whether to name the lines.

    Returns:
        The axes, with a line for each guide: coverage - level.

    Raises:
        ValueError: If there is no result, or nothing was simulated.
    """
    if not results:
        raise ValueError("there is nothing to plot: pass at least one result")
    ax = _axes(ax, _WIDE)
    for i, (name, result) in enumerate(results.items()):
        _check_simulated(result)
        chosen = str(result["latent"].values[0]) if latent is None else latent
        ranks = result["ranks"].sel(latent=[chosen]).transpose("simulation", "latent").values
        covered, _ = coverage(ranks, result.sizes["rank"] - 1, _LEVELS.tolist())
        if i == 0:
            error = 2 * np.sqrt(_LEVELS * (1 - _LEVELS) / len(ranks))
            ax.fill_between(_LEVELS, -error, error, color=_GREY, alpha=0.2, lw=0, label="exact")
        colour, marker = _sign(i)
        ax.plot(
            _LEVELS,
            covered[:, 0] - _LEVELS,
            ls=_LINE_STYLES[i % len(_LINE_STYLES)],
            color=colour,
            lw=1.5,
            marker=marker,
            ms=5,
            markevery=(i % 8, 8),  # not above one another
            label=name,
        )
    ax.axhline(0, color="black", lw=0.6)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_xlabel("nominal level of the interval")
    ax.set_ylabel("coverage - level")
    ax.set_title(f"Coverage of {chosen}", fontsize="medium")
    ax.grid(alpha=0.25, lw=0.6)
    if legend:
        _legend_below(ax)
    return ax


def _check_simulated(result: Result) -> None:
    if "ecdf" not in result:
        raise ValueError(
            "this result has no ranks: call posterior_quality with num_simulations, or calibrate"
        )


# --- all of it ------------------------------------------------------------------------------------


def plot_trust(results: Mapping[str, Result], ax: Axes | None = None) -> Axes:
    """Plots for which share of the data each guide's draws may be used, as they are and weighted.

    Args:
        results: By guide, from `posterior_quality`, per datum; the first on top.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes, with two bars for each guide. Error bars: one standard error over data.
    """
    alone = ax is None
    ax = _axes(ax, (7.0, 0.62 * len(results) + 1.6))
    places = np.arange(len(results))
    for name, shift, colour, hatch, text in (
        ("trust_guide", -0.19, _BLUE, "", "draws of q may be used as they are"),
        ("trust_weights", 0.19, _ORANGE, "//", "importance-weighted draws may be used"),
    ):
        shares = np.array([float(result[name].values.mean()) for result in results.values()])
        sizes = np.array([result.sizes["datum"] for result in results.values()])
        error = np.sqrt(shares * (1 - shares) / sizes)
        ax.barh(
            places + shift, shares, 0.36, color=colour, hatch=hatch, edgecolor="white", label=text
        )
        ax.errorbar(shares, places + shift, xerr=error, fmt="none", ecolor="black", elinewidth=1)
    ax.set_yticks(places, list(results))
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("share of the data")
    ax.set_title("Which posteriors can be trusted")
    ax.grid(alpha=0.25, lw=0.6, axis="x")
    if alone:
        ax.figure.legend(fontsize="small", loc="outside lower center", ncols=2, frameon=False)
    else:
        ax.legend(fontsize="small")
    return ax


def plot_worst(
    result: Result,
    x: Float[Tensor, "datum pixels"],
    image_shape: Sequence[int],
    *,
    by: str = "khat",
    count: int = 8,
    pixels: str = "ink",
) -> Figure:
    """Shows the data with the worst posteriors, each with what speaks against it.

    Args:
        result: From `posterior_quality` of the same data.
        x: Images, a row each.
        image_shape: Rows and columns of an image.
        by: What to rank by, see `worst_data`.
        count: How many data at most.
        pixels: What a pixel counts, see `Dataset`: "ink" is drawn black, "light" white.

    Raises:
        ValueError: If result and data differ in length, rows are no such images, or `by` is no
            number per datum.
    """
    if result.sizes.get("datum") != len(x):
        raise ValueError(
            f"the result has {result.sizes.get('datum')} data and x {len(x)}: pass the result's "
            "data"
        )
    images = _images(x, image_shape)
    numbered = result.assign_coords(datum=np.arange(len(x)))
    worst = worst_data(numbered, by, count)
    rows = math.ceil(worst.sizes["datum"] / 2)
    figure = Figure(figsize=(11.0, 1.45 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, 4, squeeze=False, width_ratios=(1, 3.4, 1, 3.4)).ravel()
    for ax in panels:
        ax.set_axis_off()
    for i, datum in enumerate(worst["datum"].values.tolist()):
        chosen = numbered.sel(datum=datum)
        shown, said = panels[2 * i], panels[2 * i + 1]
        shown.imshow(images[datum].numpy(), **_look_of(pixels))
        head = (
            f"datum {datum}: k-hat {float(chosen['khat']):.2f}, "
            f"KL(q || p) {float(chosen['kl_guide_posterior']):.2f} nats"
        )
        said.text(0, 1, head, va="top", fontsize="small", fontweight="bold")
        reason = textwrap.fill(str(chosen["reason"].values), 58, max_lines=6, placeholder=" ...")
        said.text(0, 0.84, reason, va="top", fontsize="small")
    what = str(worst[by].attrs.get("description", by))
    figure.suptitle(f"The worst posteriors, by {what}", fontsize="medium")
    return figure
