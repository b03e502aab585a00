"""Figures of k-hat: over the data, by class, on the plane of two latents; of data left out."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyro_vae.data import Seed, as_seed
from pyro_vae.inference.log_weights import khat_threshold
from pyro_vae.plots.style import _BLUE, _ORANGE, _SQUARE, _WIDE, _axes, _legend_below, _title
from pyro_vae.results import Result

__all__ = ["plot_khat", "plot_khat_by_class", "plot_khat_plane", "plot_loo_pit"]


def plot_khat(result: Result, ax: Axes | None = None, *, data: str = "") -> Axes:
    """Plots how k-hat is spread over the data, with the threshold.

    Args:
        result: From `posterior_quality`, per datum, or from `loo`.
        ax: Where to draw; a new figure if None.
        data: The name of the data, for the title.

    Returns:
        The axes, with a histogram of the data below the threshold and one of those above. Data
        without a finite k-hat are counted in the legend.

    Raises:
        ValueError: If the result has no k-hat for each datum.
    """
    khat, threshold = _khat(result)
    ax = _axes(ax, _WIDE)
    finite = khat[np.isfinite(khat)]
    # Edges on the threshold, so that no bar is on both sides of it.
    low = math.floor((min(finite.min(initial=threshold), 0.0) - threshold) / 0.1)
    high = max(math.ceil((finite.max(initial=threshold) - threshold) / 0.1), 1)
    edges = threshold + 0.1 * np.arange(low, high + 1)
    for chosen, colour, hatch, text in (
        (finite[finite <= threshold], _BLUE, "", "weights may be used"),
        (finite[finite > threshold], _ORANGE, "//", "weights may not"),
    ):
        ax.hist(
            chosen,
            edges.tolist(),
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=f"{text}, by k-hat: {len(chosen)}",
        )
    ax.axvline(threshold, color="black", lw=1.2, ls="--", label=f"threshold {threshold:.2f}")
    unknown = len(khat) - len(finite)
    if unknown:
        ax.plot([], [], " ", label=f"no finite k-hat: {unknown}")
    ax.set_xlabel("Pareto k-hat")
    ax.set_ylabel("data")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    about = f"{len(khat)} data, {result['khat'].attrs['num_particles']} draws each"
    ax.set_title(_title("k-hat over the data", data, about))
    _legend_below(ax)
    return ax


def plot_khat_by_class(
    result: Result,
    labels: Int64[Tensor, " datum"],
    ax: Axes | None = None,
    *,
    label_names: Sequence[str] | None = None,
    seed: Seed = 0,
) -> Axes:
    """Plots k-hat by class: a dot for each datum, a bar at the class's median.

    Args:
        result: From `posterior_quality`, per datum.
        labels: The classes of the data.
        ax: Where to draw; a new figure if None.
        label_names: `label_names[k]` is the name of class k.
        seed: Of the sideways scatter of the dots, which means nothing.

    Raises:
        ValueError: If the result has no k-hat for each datum, or another number of data.
    """
    seed = as_seed(seed)
    khat, threshold = _khat(result)
    classes = labels.cpu().numpy()
    if len(classes) != len(khat):
        raise ValueError(f"there are {len(classes)} labels for {len(khat)} data: pass one for each")
    ax = _axes(ax, _WIDE)
    jitter = np.random.default_rng(seed).uniform(-0.28, 0.28, len(khat))
    present = np.unique(classes)
    for place, k in enumerate(present):
        own = (classes == k) & np.isfinite(khat)
        for bad, colour, marker in ((False, _BLUE, "o"), (True, _ORANGE, "^")):
            use = own & ((khat > threshold) == bad)
            ax.scatter(
                place + jitter[use], khat[use], s=16, color=colour, marker=marker, lw=0, alpha=0.75
            )
        if own.any():
            ax.plot([place - 0.35, place + 0.35], [np.median(khat[own])] * 2, "k-", lw=2)
    ax.axhline(threshold, color="black", lw=1.2, ls="--")
    names = [str(k) if label_names is None else label_names[k] for k in present]
    ax.set_xticks(range(len(present)), names)
    ax.set_xlabel("class")
    ax.set_ylabel("Pareto k-hat")
    ax.set_title("k-hat by class\nbar: median; dashed: threshold")
    return ax


def plot_khat_plane(result: Result, ax: Axes | None = None) -> Axes:
    """Shows where among two latents the data with a good and with a bad k-hat lie.

    Args:
        result: From `posterior_quality`, per datum, of a model with two latents.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes; the first collection holds the means of q with a good k-hat, the second the
        others.

    Raises:
        ValueError: If there are not two latents, or no k-hat for each datum.
    """
    khat, threshold = _khat(result)
    if result.sizes["latent"] != 2:
        raise ValueError(
            f"a plane is drawn for 2 latents, not {result.sizes['latent']}: use plot_khat"
        )
    ax = _axes(ax, _SQUARE)
    mean = result["mean"].transpose("datum", "latent").values
    good = khat <= threshold
    for use, colour, marker, size, text in (
        (good, _BLUE, "o", 16, "k-hat up to"),
        (~good, _ORANGE, "^", 40, "above"),
    ):
        ax.scatter(
            mean[use, 0],
            mean[use, 1],
            s=size,
            color=colour,
            marker=marker,
            lw=0,
            alpha=0.8,
            label=f"{text} {threshold:.2f}",
        )
    names = result["latent"].values
    ax.set_xlabel(f"mean of q, {names[0]}")
    ax.set_ylabel(f"mean of q, {names[1]}")
    ax.set_title("k-hat on the latent plane")
    ax.set_aspect("equal", adjustable="datalim")
    _legend_below(ax)
    return ax


def plot_loo_pit(result: Result, ax: Axes | None = None) -> Axes:
    """Plots the ECDF of LOO-PITs less that of uniform ones, with its simultaneous 95 % band.

    Above the band first and below it then: data are more often far out than predicted. The other
    way round: predictions are too wide. Above all along: they are too high.

    Args:
        result: From `loo` with ``pit=True``.
        ax: Where to draw; a new figure if None.

    Raises:
        ValueError: If the result has no PITs.
    """
    if "pit_ecdf" not in result:
        raise ValueError("this result has no PITs: pass one of loo(..., pit=True)")
    ax = _axes(ax, _WIDE)
    count = result.sizes["rank"]
    uniform = (np.arange(count) + 1) / count
    lower, upper = (result[f"ecdf_{end}"].values - uniform for end in ("lower", "upper"))
    ax.fill_between(
        uniform, lower, upper, step="mid", color="0.5", alpha=0.2, lw=0, label="95 % band"
    )
    ax.plot(uniform, result["pit_ecdf"].values - uniform, color=_BLUE, lw=1.6, label="data")
    ax.axhline(0, color="black", lw=0.6)
    ax.set_xlabel("share of the predictive distribution below the datum")
    ax.set_ylabel("ECDF - uniform")
    about = f"{result.sizes['datum']} data, test of uniformity p = {float(result.pit_p_value):.2g}"
    ax.set_title(_title("Each datum in its prediction from the others", "", about))
    _legend_below(ax)
    return ax


def _khat(result: Result) -> tuple[np.ndarray, float]:
    if "khat" not in result or result["khat"].dims != ("datum",):
        raise ValueError(
            "this result has no k-hat for each datum: pass one of posterior_quality with "
            "joint=False"
        )
    return result["khat"].values, khat_threshold(int(result["khat"].attrs["num_particles"]))
