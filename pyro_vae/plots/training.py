"""Figures of training: gradients draw by draw, what methods reach along the way, and where to."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import nn

from pyro_vae.data import Seed
from pyro_vae.plots.images import plot_samples
from pyro_vae.plots.style import _BLUE, _GREY, _ORANGE, _axes, _sign, _signs, _title
from pyro_vae.results import Result

__all__ = ["plot_gradient_draws", "plot_learning_curves", "plot_rates", "plot_sample_grids"]

_TAILS = (0.02, 0.98)  # of the widest distribution of gradients, between which it is drawn
_STYLES = ("-", "--", "-.", ":")


def plot_gradient_draws(
    result: Result, *, exact: float | None = None, variances: Mapping[str, Any] | None = None
) -> Figure:
    """Plots the distribution of single gradients, and their variance against the particles.

    Args:
        result: From `gradient_draws`.
        exact: The gradient in closed form, a black line.
        variances: By estimator, closed-form variances for each number of particles: thin lines.

    Returns:
        A figure of two axes: histograms at the fewest particles (one for each estimator, named with
        its mean and standard error), and variances with their standard errors, whose dotted
        guides fall as 1/K.
    """
    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    particles = result["num_particles"].values
    signs = _signs(result["estimator"].values)
    first = _first_draws(result)
    edges = np.linspace(*_range_of(list(first.values())), 81)
    for name, (count, draws) in first.items():
        colour = signs[name][0]
        heights = np.histogram(draws, edges)[0] / (len(draws) * (edges[1] - edges[0]))
        row = result.sel(estimator=name, num_particles=count)
        text = f"{name}, K = {count}: {float(row['mean']):.3g} ± {float(row['mean_se']):.1g}"
        left.stairs(heights, edges, color=colour, fill=True, alpha=0.25)
        left.stairs(heights, edges, color=colour, lw=1.5, label=text)
    if exact is not None:
        left.axvline(exact, color="black", lw=1.6, label=f"closed form: {exact:.3g}")
    left.set_xlim(edges[0], edges[-1])
    left.set_xlabel("one gradient of the bound, nats")
    left.set_ylabel("density")
    left.set_title("Single gradients and their mean", fontsize="medium")
    left.set_ylim(0, left.get_ylim()[1] * (1 + 0.09 * (len(first) + 1)))
    left.legend(fontsize="small", loc="upper left", frameon=False)
    for name in result["estimator"].values:
        row = result.sel(estimator=name)
        variance, error = row["variance"].values, row["variance_se"].values
        colour, marker = signs[str(name)]
        use = np.isfinite(variance) & (variance > 0)
        if not use.any():
            continue
        bars = np.stack([np.minimum(error, 0.9 * variance), error])[:, use]
        look: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "ms": 6,
            "lw": 0,
            "elinewidth": 1,
        }
        right.errorbar(particles[use], variance[use], yerr=bars, label=str(name), **look)
        guide = variance[use][0] * particles[use][0] / particles[use]
        right.plot(particles[use], guide, ":", color=colour, lw=1)
        if variances is not None and str(name) in variances:
            right.plot(particles, variances[str(name)], "-", color=colour, lw=1.2)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xticks(particles, [str(k) for k in particles])
    right.xaxis.set_minor_locator(NullLocator())
    right.set_xlabel("particles K")
    right.set_ylabel("variance of one gradient, nats squared")
    lines = "dotted: 1/K" if variances is None else "dotted: 1/K, solid: closed form"
    right.set_title(f"Variance ({lines})", fontsize="medium")
    right.grid(alpha=0.25, lw=0.6)
    right.legend(fontsize="small")
    return figure


def _first_draws(result: Result) -> dict[str, tuple[int, np.ndarray]]:
    """Of each estimator the draws at the fewest particles it takes."""
    found = {}
    for name in result["estimator"].values:
        for count in result["num_particles"].values:
            draws = result["gradient"].sel(estimator=name, num_particles=count).values
            if np.isfinite(draws).all():
                found[str(name)] = int(count), draws
                break
    return found


def _range_of(drawn: Sequence[tuple[int, np.ndarray]]) -> tuple[float, float]:
    ends = np.array([np.quantile(draws, _TAILS) for _, draws in drawn])
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room


def plot_learning_curves(
    result: Result | Mapping[str, Result], *, variable: str = "elbo", data: str = ""
) -> Figure:
    """Plots bound or evidence against the training data gone through, a panel for each model.

    Training data are solid, test data dashed: with `variable="elbo"` and models of several latent
    sizes figure 2 of the paper, with `"log_evidence"` and results of several training sets figure
    3.

    Args:
        result: From `learning_curves`, or several by name.
        variable: "elbo" or "log_evidence".
        data: The name of the data, for the title.

    Returns:
        A figure with an axes for each result and model, all on one scale.

    Raises:
        ValueError: If a result has no such variable.

    References:
        Kingma & Welling (2014), Auto-encoding variational Bayes, arXiv:1312.6114, figures 2 and 3.
    """
    results = dict(result) if not isinstance(result, Result) else {"": result}
    panels = []
    for name, one in results.items():
        if variable not in one:
            raise ValueError(
                f"the result has no {variable}; measure it with the method 'importance', or plot "
                "log_evidence"
            )
        for model in one["model"].values:
            panels.append((", ".join(filter(None, (name, str(model)))), one.sel(model=model)))
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.6 * columns + 0.6, 3.0 * rows + 1.1), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for ax, (title, curves) in zip(axes, panels, strict=False):
        _curves(ax, curves, variable)
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel("training data gone through")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    word = {"elbo": "ELBO", "log_evidence": "log evidence (estimate)"}[variable]
    figure.supylabel(f"{word}, nats per datum")
    figure.suptitle(_title(f"{word[0].upper()}{word[1:]} while training", data, "by algorithm"))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=panels[0][1].sizes["algorithm"],  # a column for each
        fontsize="small",
        frameon=False,
    )
    return figure


def _curves(ax: Axes, curves: Any, variable: str) -> None:
    for i, algorithm in enumerate(curves["algorithm"].values):
        colour, marker = _sign(i)
        for style, split in zip(_STYLES, curves["split"].values, strict=False):
            row = curves.sel(algorithm=algorithm, split=split)
            values, error = row[variable].values, row[f"{variable}_se"].values
            label = f"{algorithm}, {split}"
            face = colour if style == "-" else "white"
            look: dict[str, Any] = {"color": colour, "ls": style, "marker": marker, "ms": 4}
            ax.plot(row["samples"], values, lw=1.5, label=label, markerfacecolor=face, **look)
            ax.fill_between(row["samples"], values - error, values + error, color=colour, alpha=0.2)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.tick_params(axis="x", labelsize="small")
    ax.yaxis.set_major_locator(MaxNLocator(6))
    ax.grid(alpha=0.25, lw=0.6)


def plot_sample_grids(
    modules: Mapping[str, nn.Module],
    image_shape: Sequence[int],
    *,
    num_images: int = 64,
    seed: Seed = 0,
    data: str = "",
    pixels: str = "ink",
) -> Figure:
    """Shows draws from several models, such as those of different latent sizes, side by side.

    Args:
        modules: By name, what `plot_samples` takes.
        image_shape: Rows and columns of an image.
        num_images: Draws from each.
        seed: Of the draws.
        data: The name of the data, for the title.
        pixels: What a pixel counts, see `Dataset`: "ink" is drawn black, "light" white.

    Returns:
        A figure with an axes for each model.

    Raises:
        ValueError: If there is no model, or draws are not images of that shape.

    References:
        Kingma & Welling (2014), Auto-encoding variational Bayes, arXiv:1312.6114, figure 5.
    """
    if not modules:
        raise ValueError("there are no models to draw from: pass at least one")
    figure = Figure(figsize=(3.3 * len(modules), 3.8), layout=ConstrainedLayoutEngine(w_pad=0.15))
    for ax, (name, module) in zip(
        figure.subplots(1, len(modules), squeeze=False)[0], modules.items(), strict=True
    ):
        plot_samples(module, image_shape, ax, num_images=num_images, seed=seed, pixels=pixels)
        ax.set_title(name, fontsize="medium")
    figure.suptitle(_title("Draws from the prior", data, f"means of p(x | z), seed {seed}"))
    return figure


def plot_rates(surgeries: Mapping[str, Result], ax: Axes | None = None, *, data: str = "") -> Axes:
    """Plots what latents know of the data, and what they differ from the prior by.

    A bar is the rate, E KL(q(z | x) || p(z)), of information (the mutual information of datum and
    latents; near zero where the latents are ignored) and of the marginal KL. A dashed line stands
    at log N, more than which N data cannot have.

    Args:
        surgeries: From `elbo_surgery`, by name, such as that of the objective.
        ax: Where to draw; a new figure if None.
        data: The name of the data, for the title.

    Returns:
        The axes, with two bars for each result.

    Raises:
        ValueError: If there are no results.

    References:
        Hoffman & Johnson (2016), ELBO surgery; Zhao, Song & Ermon (2019), InfoVAE,
        arXiv:1706.02262.
    """
    if not surgeries:
        raise ValueError("there is nothing to show: pass at least one result of elbo_surgery")
    ax = _axes(ax, (7.4, 0.75 * len(surgeries) + 1.9))
    most = max(math.log(result.sizes["datum"]) for result in surgeries.values())
    for place, result in enumerate(surgeries.values()):
        information, marginal = (
            float(result[name].values.mean()) for name in ("mutual_information", "marginal_kl")
        )
        reconstruction = -float(result["distortion"].values.mean())
        first = place == 0
        bars: dict[str, Any] = {"height": 0.55, "zorder": 2}
        for left, width, colour, hatch, text in (
            (0.0, information, _BLUE, "", "information of z about the datum"),
            (max(information, 0.0), marginal, _ORANGE, "//", "KL(q(z) || p(z))"),
        ):
            ax.barh(
                place,
                max(width, 0.0),
                left=left,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                label=text if first else None,
                **bars,
            )
        ax.annotate(
            f"{information:.2f} + {marginal:.2f}, reconstruction {reconstruction:.2f}",
            (max(information, 0.0) + max(marginal, 0.0), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
            bbox={"facecolor": "white", "lw": 0, "pad": 1.5},
            zorder=4,
        )
    ax.axvline(most, color=_GREY, ls="--", lw=1.2, label=f"log N = {most:.2f}")
    ax.set_yticks(range(len(surgeries)), list(surgeries))
    ax.set_ylim(len(surgeries) - 0.5, -0.5)
    ax.set_xlim(0, 1.75 * max(most, ax.get_xlim()[1]))
    ax.set_xlabel("nats per datum")
    ax.set_title(_title("What the latents know", data, "rate = information + marginal KL"))
    ax.legend(
        fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=3, frameon=False
    )
    return ax
