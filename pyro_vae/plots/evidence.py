"""Figures of bounds and gaps: while training, of a data set, by its parts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyro_vae.inference.log_weights import khat_threshold
from pyro_vae.plots.images import _images, _look_of
from pyro_vae.plots.style import _BLUE, _GREY, _ORANGE, _WIDE, _axes, _name_band, _thousands, _title
from pyro_vae.results import Result

__all__ = ["plot_bound", "plot_evidence", "plot_gap", "plot_widest_gaps"]


def plot_bound(history: xr.Dataset, ax: Axes | None = None, *, data: str = "") -> Axes:
    """Plots the bound (or objective) against epochs, between its parts: reconstruction - KL.

    The upper line of a pair is the reconstruction term, the lower one the bound, and the band
    between them is the KL term. Training data are solid, held-out data dashed.

    Args:
        history: Of a `Fit` or a `Run`, dimension `epoch`; nats per datum.
        ax: Where to draw; a new figure if None.
        data: The name of the data, for the title.

    Returns:
        The axes, with one line for each of `bound`, `reconstruction` and their `validation_`
        counterparts that the history has.

    Raises:
        ValueError: If the history has no rows yet.
    """
    if "bound" not in history or not history.sizes["epoch"]:
        raise ValueError("the history has no rows: train for an epoch first")
    ax = _axes(ax, _WIDE)
    epoch = history["epoch"].values
    marker = "o" if len(epoch) < 4 else ""  # one point makes no line
    is_bound = history["bound"].attrs.get("bound") != "objective"
    name = "ELBO" if is_bound else "objective"
    for prefix, colour, style, who in (
        ("", _BLUE, "-", "training"),
        ("validation_", _ORANGE, "--", "held out"),
    ):
        if f"{prefix}bound" not in history:
            continue
        bound = history[f"{prefix}bound"].values
        look: dict[str, Any] = {"ls": style, "color": colour, "marker": marker, "ms": 4}
        ax.plot(epoch, bound, lw=1.8, label=f"{name}, {who}", zorder=3, **look)
        if f"{prefix}reconstruction" in history:
            parts = history[f"{prefix}reconstruction"].values
            ax.plot(epoch, parts, lw=0.9, label=f"reconstruction, {who}", **look)
            ax.fill_between(epoch, bound, parts, color=colour, alpha=0.12, lw=0)
            if not prefix and not marker:
                _name_band(ax, epoch, bound, parts, "KL")
    if len(epoch) > 20:  # most of the rise is in the first epochs
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel("epoch")
    ax.set_ylabel("nats per datum")
    what = "Bound while training" if is_bound else "Objective while training"
    ax.set_title(_title(what, data, "1 particle" if is_bound else "bounds nothing"))
    ax.grid(alpha=0.25, lw=0.6)
    ax.legend(fontsize="small")
    return ax


def plot_evidence(result: xr.Dataset, ax: Axes | None = None, *, data: str = "") -> Axes:
    """Plots the log evidence against the ELBO, a point for each datum, coloured by k-hat.

    A point's height above the diagonal is the datum's gap. Where k-hat is too large for the number
    of particles the point is a ringed triangle: its height is a lower bound whose error is
    unreliable.

    Args:
        result: What `log_evidence` returns, with dimension `datum`.
        ax: Where to draw; a new figure if None.
        data: The name of the data, for the title; if empty, the result's attribute "data".

    Returns:
        The axes; the first collection holds the data with a good k-hat, the second the others.

    Raises:
        ValueError: If the result has no values per datum (it is exact, or joint).
    """
    if "khat" not in result or result["khat"].dims != ("datum",):
        raise ValueError(
            "this result has no ELBO and k-hat for each datum: pass one of log_evidence with "
            "method='importance' and joint=False"
        )
    ax = _axes(ax, (6.0, 4.9))
    elbo, evidence = result["elbo"].values, result["log_evidence"].values
    khat = result["khat"].values
    particles = int(result["khat"].attrs["num_particles"])
    threshold = khat_threshold(particles)
    good = khat <= threshold
    colours = Normalize(min(0.0, threshold - 0.1), 1.0)
    shown: dict[str, Any] = {"cmap": "cividis", "norm": colours, "zorder": 3}
    ax.scatter(
        elbo[good],
        evidence[good],
        c=khat[good],
        s=18,
        label=f"k-hat up to {threshold:.2f}: {good.sum()} data",
        **shown,
    )
    ax.scatter(
        elbo[~good],
        evidence[~good],
        c=np.nan_to_num(khat[~good], nan=1.0, posinf=1.0),
        s=42,
        marker="^",
        edgecolors=_ORANGE,
        linewidths=1.3,
        label=f"k-hat above, or unknown: {(~good).sum()} data",
        **shown,
    )
    ends = np.array([elbo.min(), evidence.max()])
    ax.plot(ends, ends, color=_GREY, lw=1, ls="--", label="no gap", zorder=2)
    ax.figure.colorbar(
        ScalarMappable(colours, "cividis"), ax=ax, label="Pareto k-hat", extend="both", pad=0.02
    )
    ax.set_xlabel("ELBO, nats")
    ax.set_ylabel("log evidence (importance estimate), nats")
    name = data or str(result.attrs.get("data", ""))
    about = f"{_thousands(len(elbo))} data, {_thousands(particles)} particles"
    ax.set_title(_title("Evidence of each datum", name, about))
    ax.grid(alpha=0.25, lw=0.6)
    ax.legend(fontsize="small", loc="upper left")
    return ax


def plot_gap(decompositions: Mapping[str, Result] | Result, ax: Axes | None = None) -> Axes:
    """Plots the gap of the ELBO as a bar, stacked from amortisation and approximation.

    A diamond in the approximation part marks how much of it a normal of full covariance would
    close, a triangle how much a flow. Error bars are Monte-Carlo errors of the means.

    Args:
        decompositions: From `elbo_gap`, or several of them by name, the first on top.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes, with two bars for each decomposition.

    References:
        Cremer, Li & Duvenaud (2018), Inference suboptimality in variational autoencoders.
    """
    named = {"": decompositions} if isinstance(decompositions, Result) else decompositions
    alone = ax is None
    ax = _axes(ax, (7.4, 0.5 * len(named) + 1.9))
    places = np.arange(len(named))
    left = np.zeros(len(named))
    for name, colour, hatch, text in (
        ("amortization_gap", _BLUE, "", "amortisation: lost by the encoder"),
        ("approximation_gap", _ORANGE, "//", "approximation: beyond the family"),
    ):
        quantities = [decomposition.quantity(name) for decomposition in named.values()]
        values = np.array([q.value for q in quantities])
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "alpha": 0.8}
        ax.barh(places, values, left=left, height=0.62, label=text, zorder=2, **look)
        errors = [q.standard_error or 0.0 for q in quantities]
        ax.errorbar(left + values, places, xerr=errors, fmt="none", ecolor="black", zorder=3)
        start, left = left, left + values
    for family, marker, text in (("full", "D", "full covariance"), ("flow", "^", "a flow")):
        gain = f"gain_{family}"
        shown = [i for i, decomposition in enumerate(named.values()) if gain in decomposition]
        if shown:
            gains = np.array([named[list(named)[i]].quantity(gain).value for i in shown])
            ax.plot(
                start[shown] + gains,
                places[shown],
                marker,
                color="white",
                markeredgecolor="black",
                ms=7,
                zorder=4,
                label=f"closed up to here by {text}",
            )
    for place, end, decomposition in zip(places, left, named.values(), strict=True):
        ax.text(
            float(end),
            float(place) - 0.04,  # above the line of the error
            f"  ELBO {decomposition.quantity('elbo').value:.2f}",
            va="bottom",
            zorder=4,
        )
    ax.set_yticks(places, list(named))
    ax.invert_yaxis()
    ax.set_xlim(min(0.0, *left), 1.28 * max(*left, 1e-9))
    ax.set_xlabel("log evidence - ELBO, nats per datum")
    ax.set_title("Where the ELBO falls short")
    ax.grid(alpha=0.25, lw=0.6, axis="x")
    if alone:
        ax.figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    else:
        ax.legend(fontsize="small")
    return ax


def plot_widest_gaps(
    decomposition: Result,
    x: Float[Tensor, "batch pixels"],
    image_shape: Sequence[int],
    *,
    num_images: int = 12,
    pixels: str = "ink",
) -> Figure:
    """Shows the data with the widest gaps, each with its gap in nats.

    Args:
        decomposition: From `elbo_gap`, of the same data.
        x: Images, a row each.
        image_shape: Rows and columns of an image.
        num_images: How many, from the widest on.
        pixels: What a pixel counts, see `Dataset`: "ink" is drawn black, "light" white.

    Returns:
        A figure with a panel for each image: above it the gap, below it its parts, the
        encoder's (amortisation) and the family's (approximation).

    Raises:
        ValueError: If the gap is of another number of data, or rows are no such images.
    """
    if decomposition.sizes["datum"] != len(x):
        raise ValueError(
            f"the gap is of {decomposition.sizes['datum']} data and x has {len(x)}; pass the data "
            "that the gap was measured on"
        )
    images = _images(x, image_shape)
    order = np.argsort(-decomposition["gap"].values)[:num_images]
    columns = min(6, len(order))
    rows = math.ceil(len(order) / columns)
    figure = Figure(figsize=(1.35 * columns, 1.9 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for panel in panels[len(order) :]:
        panel.axis("off")
    for ax, i in zip(panels, order, strict=False):
        ax.set_xticks([])
        ax.set_yticks([])
        ax.imshow(images[i].numpy(), **_look_of(pixels))
        parts = [
            float(decomposition[name][i]) for name in ("amortization_gap", "approximation_gap")
        ]
        ax.set_title(f"{float(decomposition['gap'][i]):.1f}", fontsize="medium")
        ax.set_xlabel("encoder {:.1f}\nfamily {:.1f}".format(*parts), fontsize="small")
    figure.suptitle("The widest gaps, nats", fontsize="medium")
    return figure
