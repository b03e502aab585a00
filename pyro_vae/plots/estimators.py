"""Figures of estimators: signal against noise, cost, what each trained to."""

import math

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from pyro_vae.diagnostics.gradients import snr_slopes
from pyro_vae.plots.style import _BLUE, _GREY, _ORANGE, _axes, _legend_below, _signs, _title
from pyro_vae.results import Result

__all__ = ["plot_estimator_cost", "plot_evidence_by_estimator", "plot_signal_to_noise"]


def plot_signal_to_noise(
    result: Result, ax: Axes | None = None, *, parameter: str = "guide"
) -> Axes:
    """Plots the signal-to-noise ratio of gradients against K, both axes logarithmic.

    The legend has the fitted slopes with their standard errors. Points in the shaded band, below
    the noise floor, are hollow: there the ratio is that of noise. The band is left out where all
    points are far above it. A line is drawn where a slope could be fitted.

    Args:
        result: From `compare_estimators`.
        ax: Where to draw; a new figure if None.
        parameter: The group of parameters.

    Returns:
        The axes, with one error bar container for each estimator that has an SNR.

    References:
        Rainforth et al. (2018), Tighter variational bounds are not necessarily better.
    """
    ax = _axes(ax, (6.8, 6.2))
    slopes = snr_slopes(result).sel(parameter=parameter)
    floor = float(result["snr"].attrs["noise_floor"])
    particles = result["num_particles"].values
    signs = _signs(result["estimator"].values)
    for name in result["estimator"].values:
        chosen = result.sel(estimator=name, parameter=parameter)
        snr, error = chosen["snr"].values, chosen["snr_se"].values
        if not np.isfinite(snr).any():
            continue
        colour, marker = signs[str(name)]
        slope, slope_se = (float(slopes.sel(estimator=name)[n]) for n in ("slope", "slope_se"))
        text = "no slope" if math.isnan(slope) else f"{slope:+.3f} ± {slope_se:.3f}"
        hidden = np.minimum(error, 0.9 * snr)  # a bar that reaches 0 has no end on a log axis
        ax.errorbar(
            particles,
            snr,
            yerr=np.stack([hidden, error]),
            fmt="none",
            ecolor=colour,
            elinewidth=1,
            zorder=2,
        )
        for above in (True, False):
            use = np.isfinite(snr) & ((snr >= floor) == above)
            ax.plot(
                particles[use],
                snr[use],
                marker,
                color=colour,
                markerfacecolor=colour if above else "white",
                ms=6,
                label=f"{name}: {text}" if above or not (snr >= floor).any() else None,
                zorder=3,
            )
        if not math.isnan(slope):
            ends = particles[np.isfinite(snr)].astype(float)[[0, -1]]
            start = float(slopes.sel(estimator=name)["intercept"])
            ax.plot(ends, np.exp(start + slope * np.log(ends)), color=colour, lw=1.1, zorder=1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(particles, [str(k) for k in particles])
    ax.minorticks_off()
    if ax.get_ylim()[0] < 10 * floor:  # else all is far above it
        low = min(ax.get_ylim()[0], floor / 2)
        ax.set_ylim(bottom=low)
        ax.axhspan(low, floor, color=_GREY, alpha=0.15, lw=0, label="noise floor")
    if ax.get_ylim()[1] < 100 * ax.get_ylim()[0]:  # powers of ten would be too few ticks
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("particles K")
    ax.set_ylabel("signal-to-noise ratio of one gradient")
    ax.set_title(f"Signal-to-noise of gradients: {parameter}")
    ax.grid(alpha=0.25, lw=0.6)
    _legend_below(ax, title="slope of log SNR against log K")
    return ax


def plot_estimator_cost(
    result: Result, ax: Axes | None = None, *, parameter: str = "guide"
) -> Axes:
    """Plots the variance of gradients against their cost, a line through the K of an estimator.

    The cost is in passes: runs of the programs with one particle, the same on every machine.
    Dotted lines join points of equal variance x passes: below one is better than above. Estimators
    with a bias are hollow, for their variance is not the whole error.

    Args:
        result: From `compare_estimators`.
        ax: Where to draw; a new figure if None.
        parameter: The group of parameters.

    Returns:
        The axes, with one line for each estimator.
    """
    ax = _axes(ax, (6.8, 6.2))
    chosen = result.sel(parameter=parameter)
    shown = chosen["variance"].values > 0
    signs = _signs(result["estimator"].values)
    for i, name in enumerate(result["estimator"].values):
        row, use = chosen.sel(estimator=name), shown[i]
        if not use.any():
            continue
        biased = bool((row["verdict"].values[use] == "biased").any())
        colour, marker = signs[str(name)]
        ax.plot(
            row["passes"].values[use],
            row["variance"].values[use],
            "--" if biased else "-",
            marker=marker,
            color=colour,
            markerfacecolor="white" if biased else colour,
            lw=1.1,
            ms=6,
            label=f"{name} (biased)" if biased else str(name),
            zorder=3,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    if shown.any():
        _equal_cost_lines(ax)
    particles = ", ".join(str(k) for k in result["num_particles"].values)
    ax.set_xlabel(f"passes for one gradient (along a line K = {particles})")
    ax.set_ylabel("total variance of one gradient, nats squared")
    ax.set_title(f"Noise against cost of gradients: {parameter}")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(alpha=0.25, lw=0.6)
    _legend_below(ax)
    return ax


def _equal_cost_lines(ax: Axes) -> None:
    """Lines of variance = constant / time, a factor of 10 apart."""
    across, up = ax.get_xlim(), ax.get_ylim()
    x = np.array(across)
    for power in range(
        math.floor(math.log10(across[0] * up[0])), math.ceil(math.log10(across[1] * up[1])) + 1
    ):
        ax.plot(x, 10.0**power / x, ":", color=_GREY, lw=0.7, alpha=0.6, zorder=0)
    ax.set_xlim(across)
    ax.set_ylim(up)


def plot_evidence_by_estimator(
    trained: xr.Dataset, ax: Axes | None = None, *, data: str = ""
) -> Axes:
    """Plots the test evidence that training with each estimator reached, best on top.

    Args:
        trained: With `log_evidence` over `estimator` and `training_seed`, nats per datum.
        ax: Where to draw; a new figure if None.
        data: The name of the data, for the title.

    Returns:
        The axes, with a dot for each training seed and a bar at their mean.
    """
    ax = _axes(ax, (7.0, 0.42 * trained.sizes["estimator"] + 1.8))
    evidence = trained["log_evidence"].transpose("estimator", "training_seed").values
    order = np.argsort(evidence.mean(1))
    for place, i in enumerate(order):
        ax.plot(evidence[i], [place] * len(evidence[i]), "o", color=_BLUE, ms=6, alpha=0.7)
        ax.plot([evidence[i].mean()], [place], "|", color=_ORANGE, ms=20, mew=2)
    ax.set_yticks(range(len(order)), [str(name) for name in trained["estimator"].values[order]])
    ax.set_xlabel("test log evidence (importance estimate), nats per datum")
    about = f"{trained.sizes['training_seed']} training seeds (dots) and their mean (bar)"
    ax.set_title(_title("Test evidence by estimator", data, about))
    ax.grid(alpha=0.25, lw=0.6, axis="x")
    return ax
