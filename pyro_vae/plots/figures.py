"""Figures of fits and models.

Every function takes what it shows and, if wanted, the `Axes` to draw on, and returns the `Axes`, as
ArviZ's functions do. Without one it makes a figure of its own, which belongs to no pyplot session
and so needs no closing: ``plot_bound(fit.history).figure.savefig("bound.png")``. Nothing here
changes rcParams. The colours are Okabe and Ito's and Paul Tol's, which colour-blind readers can
tell apart; what matters is told by a second sign as well (a line style, a marker, a word).
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int64
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor, nn

from pyro_vae.checks import check_count
from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.gradients import snr_slopes
from pyro_vae.inference.estimators import estimator_names
from pyro_vae.inference.log_weights import khat_threshold
from pyro_vae.results import Result

__all__ = [
    "pixels_text",
    "plot_bound",
    "plot_estimator_cost",
    "plot_evidence",
    "plot_evidence_by_estimator",
    "plot_gap",
    "plot_latent",
    "plot_manifold",
    "plot_reconstructions",
    "plot_samples",
    "plot_signal_to_noise",
    "plot_widest_gaps",
]

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#595959"
_CLASSES = (  # Paul Tol's "muted" scheme, ordered so that neighbouring classes differ in lightness
    "#332288",
    "#CC6677",
    "#117733",
    "#88CCEE",
    "#882255",
    "#DDCC77",
    "#44AA99",
    "#AA4499",
    "#999933",
    "#7F7F7F",
)
_MARKERS = "os^vDP*X<>"
_COMMON = (  # estimators with a colour of their own
    *("PathwiseELBO", "AnalyticELBO", "StickingTheLanding", "ScoreFunction", "LeaveOneOut"),
    *("ImportanceWeighted", "DReG", "VIMCO", "ReweightedWakeSleep", "WakeDReG"),
)
_PYROS = ("Pyro Trace_ELBO", "Pyro TraceGraph_ELBO", "Pyro RenyiELBO")
_ESTIMATORS = {  # the place of each in `_CLASSES`, so that it looks the same in every figure
    name: place for place, name in enumerate(dict.fromkeys((*_COMMON, *estimator_names(), *_PYROS)))
}
_SQUARE, _WIDE = (5.2, 5.2), (6.4, 4.6)


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    return Figure(figsize=size, layout="constrained").add_subplot() if ax is None else ax


def _thousands(number: int) -> str:
    return f"{number:,}"


# --- numbers --------------------------------------------------------------------------------------


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


def _name_band(ax: Axes, x: np.ndarray, below: np.ndarray, above: np.ndarray, name: str) -> None:
    at = int(
        np.searchsorted(x, math.sqrt(float(x[0]) * float(x[-1]))) if len(x) > 20 else len(x) // 2
    )
    ax.text(float(x[at]), float(below[at] + above[at]) / 2, name, ha="center", va="center")


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


def _title(what: str, data: str, about: str) -> str:
    return f"{what}\n{data}, {about}" if data else f"{what}\n{about}"


# --- estimators -----------------------------------------------------------------------------------


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


def _signs(names: Iterable[Any]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each name: for estimators always theirs, whatever stands beside.

    Other names get, in their order, the first signs that no estimator among them has.
    """
    own = {str(name): _ESTIMATORS.get(str(name).split("(")[0]) for name in names}
    free: Iterator[int] = (
        i for i in itertools.count() if i % len(_CLASSES) not in _places(own.values())
    )
    if len(_places(own.values())) == len(_CLASSES):
        free = itertools.count(len(_ESTIMATORS))
    return {name: _sign(next(free) if place is None else place) for name, place in own.items()}


def _places(given: Iterable[int | None]) -> set[int]:
    """The colours that are taken."""
    return {place % len(_CLASSES) for place in given if place is not None}


def _sign(i: int) -> tuple[str, str]:
    """A colour and a marker; pairs repeat after a hundred."""
    rounds, place = divmod(i, len(_CLASSES))
    return _CLASSES[place], _MARKERS[(place + rounds) % len(_MARKERS)]


def _legend_below(ax: Axes, title: str | None = None) -> None:
    ax.legend(
        fontsize="small",
        title=title,
        title_fontsize="small",
        ncols=2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        frameon=False,
    )


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


# --- pictures -------------------------------------------------------------------------------------


def plot_reconstructions(
    module: nn.Module,
    x: Float[Tensor, "batch pixels"],
    image_shape: Sequence[int],
    ax: Axes | None = None,
    *,
    num_images: int = 12,
    data: str = "",
    pixels: str = "ink",
) -> Axes:
    """Shows data above what the model makes of their posterior means.

    Args:
        module: A `VAE`, or a module with a method `reconstruct(x)`.
        x: Images, a row each.
        image_shape: Rows and columns of an image.
        ax: Where to draw; a new figure if None.
        num_images: The first so many are shown.
        data: The name of the data, for the title.
        pixels: What a pixel counts, see `Dataset`: "ink" is drawn black, "light" white.

    Returns:
        The axes with one picture: data in its upper half, reconstructions in its lower half.

    Raises:
        TypeError: If the module cannot reconstruct.
        ValueError: If the rows are not images of that shape.
    """
    shown = x[:num_images]
    means = _call(module, "reconstruct", shown)
    rows = torch.stack([_images(shown, image_shape), _images(means, image_shape)])
    ax = _show(ax, rows, (min(0.75 * len(shown) + 1.2, 10.0), 2.1), pixels)
    _, height, _ = _grid(image_shape)
    ax.set_yticks([height / 2 - 0.5, 1.5 * height - 0.5], ["data", "recon-\nstruction"])
    ax.set_xticks([])
    ax.set_title(_title("Data and their reconstructions", data, "mean of p(x | posterior mean)"))
    return ax


def plot_samples(
    module: nn.Module,
    image_shape: Sequence[int],
    ax: Axes | None = None,
    *,
    num_images: int = 64,
    seed: Seed = 0,
    data: str = "",
    pixels: str = "ink",
) -> Axes:
    """Shows draws from the prior: the mean of x given each drawn z.

    Args:
        module: A `VAE`, or a module with a method `sample(num_samples, generator=...)`.
        image_shape: Rows and columns of an image.
        ax: Where to draw; a new figure if None.
        num_images: How many draws; the grid is as square as can be.
        seed: Seeds the draws; torch's random state is left alone.
        data: The name of the data, for the title.
        pixels: What a pixel counts, see `Dataset`: "ink" is drawn black, "light" white.

    Raises:
        TypeError: If the module cannot sample.
        ValueError: If what it draws are not images of that shape.
    """
    seed = as_seed(seed)
    check_count("num_images", num_images)
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    drawn = _images(_call(module, "sample", num_images, generator=generator), image_shape)
    columns = math.ceil(math.sqrt(num_images))
    rows = math.ceil(num_images / columns)
    blank = torch.full((rows * columns - num_images, *drawn.shape[1:]), math.nan)
    mosaic = torch.cat([drawn, blank]).reshape(rows, columns, *drawn.shape[1:])
    ax = _show(ax, mosaic, (5.2, 5.2 * rows / columns + 0.6), pixels)
    ax.set_xticks([])
    ax.set_yticks([])
    about = f"{num_images} means of p(x | z), seed {seed}"
    ax.set_title(_title("Draws from the prior", data, about))
    return ax


def plot_manifold(
    module: nn.Module,
    image_shape: Sequence[int],
    ax: Axes | None = None,
    *,
    num_steps: int = 15,
    data: str = "",
    pixels: str = "ink",
) -> Axes:
    r"""Shows the images that a grid of latents decodes to, for two latent dimensions.

    The grid is even in prior probability: :math:`z_{ij} = (\Phi^{-1}(u_i), \Phi^{-1}(u_j))` with
    :math:`u_i = (i + \tfrac12) / n`, so each picture stands for the same share of the data.

    Args:
        module: A `VAE` with two latents, or a module with `latent_dim` 2 and `decode(z)`.
        image_shape: Rows and columns of an image.
        ax: Where to draw; a new figure if None.
        num_steps: Pictures along each side, n.
        data: The name of the data, for the title.
        pixels: What a pixel counts, see `Dataset`: "ink" is drawn black, "light" white.

    Raises:
        TypeError: If the module cannot decode.
        ValueError: If it has not two latents.

    References:
        Kingma & Welling (2014), Auto-encoding variational Bayes.
    """
    if getattr(module, "latent_dim", None) != 2:
        raise ValueError(
            f"a manifold is drawn for 2 latent dimensions, not {getattr(module, 'latent_dim', '?')}"
            ": use plot_samples"
        )
    like = next(module.parameters())
    share = (torch.arange(num_steps, dtype=torch.float64) + 0.5) / num_steps
    steps = torch.special.ndtri(share)
    # Rows of a picture go down, z_2 goes up.
    z = torch.stack(torch.meshgrid(steps.flip(0), steps, indexing="ij")[::-1], dim=-1)
    means = _call(module, "decode", z.to(like).reshape(-1, 2))
    mosaic = _images(means, image_shape)
    ax = _show(ax, mosaic.reshape(num_steps, num_steps, *mosaic.shape[1:]), _SQUARE, pixels)
    _, height, width = _grid(image_shape)
    ticks = sorted({0, num_steps // 4, num_steps // 2, num_steps - 1 - num_steps // 4} - {-1})
    ticks = sorted({*ticks, num_steps - 1})
    names = [f"{steps[i].item():.1f}".replace("-0.0", "0.0") for i in ticks]
    ax.set_xticks([(i + 0.5) * width - 0.5 for i in ticks], names)
    ax.set_yticks([(num_steps - i - 0.5) * height - 0.5 for i in ticks], names)
    ax.tick_params(length=3)
    ax.set_xlabel("$z_1$")
    ax.set_ylabel("$z_2$")
    ax.set_title(_title("Where the latents lead", data, "mean of p(x | z), even prior shares"))
    return ax


def plot_latent(
    module: nn.Module,
    x: Float[Tensor, "batch features"],
    labels: Int64[Tensor, " batch"] | None = None,
    ax: Axes | None = None,
    *,
    label_names: Sequence[str] | None = None,
    data: str = "",
) -> Axes:
    """Shows the posterior means of data, or their codes, coloured and named by class.

    Of more than two latent dimensions the two most active are shown: those in which the posterior
    mean varies most over the data. Where a posterior has no mean in closed form (a flow), its
    `location` stands for it.

    Args:
        module: A `VAE`, or a module with a method `encode(x)` that gives the posterior or a code.
        x: The data.
        labels: Their classes, or None.
        ax: Where to draw; a new figure if None.
        label_names: `label_names[k]` is the name of class k.
        data: The name of the data, for the title.

    Returns:
        The axes, with a collection for each class.

    Raises:
        TypeError: If the module cannot encode.

    References:
        Burda, Grosse & Salakhutdinov (2016), Importance weighted autoencoders
        (activity).
    """
    means, point = _points(_call(module, "encode", x), module, x)
    ax = _axes(ax, _SQUARE)
    variances = means.var(0, correction=0)
    first, second = _most_active(variances)
    classes = torch.zeros(len(means), dtype=torch.int64) if labels is None else labels.cpu()
    present = classes.unique().tolist()
    for k in present:
        chosen = means[classes == k]
        across = chosen[:, first].numpy()
        up = chosen[:, second].numpy() if second is not None else np.zeros(len(chosen))
        name = str(k) if label_names is None else label_names[k]
        ax.scatter(
            across,
            up,
            s=16,
            alpha=0.75,
            linewidths=0,
            color=_CLASSES[k % len(_CLASSES)],
            marker=_MARKERS[k % len(_MARKERS)],
            label=name,
        )
        if labels is not None and len(present) <= 20:
            ax.text(
                float(np.median(across)),
                float(np.median(up)),
                name,
                ha="center",
                va="center",
                fontweight="bold",
                zorder=5,
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
    which = (
        "" if means.shape[1] <= 2 else " (most active)",
        "" if means.shape[1] <= 2 else " (next)",
    )
    ax.set_xlabel(f"{point} $z_{{{first + 1}}}${which[0]}")
    if second is not None:
        ax.set_ylabel(f"{point} $z_{{{second + 1}}}${which[1]}")
    else:
        ax.set_yticks([])
    ax.axhline(0, color=_GREY, lw=0.5, zorder=0)
    ax.axvline(0, color=_GREY, lw=0.5, zorder=0)
    about = f"{_thousands(len(means))} data, {means.shape[1]} latents"
    kind = point.removesuffix(" of")
    what = "Codes" if kind == "code" else f"Aggregated {kind}s"
    ax.set_title(_title(what, data, about))
    if second is not None:
        ax.set_aspect("equal", adjustable="datalim")
    return ax


@torch.no_grad()
def _points(
    encoded: Any, module: Any, x: Float[Tensor, "batch features"]
) -> tuple[Float[Tensor, "batch latent"], str]:
    """Where each datum lies among the latents, and what that point is."""
    if isinstance(encoded, Tensor):
        points, name = encoded, "code"
    else:
        try:
            points, name = encoded.mean, "posterior mean of"
        except NotImplementedError:  # a flow knows no mean; the title says what stands for it
            points = module.posterior.location(module.encoder(x))
            name = "posterior location of"
    return points.detach().cpu().double(), name


def _most_active(variances: Float[Tensor, " latent"]) -> tuple[int, int | None]:
    if len(variances) <= 2:
        return 0, 1 if len(variances) == 2 else None
    first, second = variances.argsort(descending=True)[:2].tolist()
    return first, second


# --- mosaics --------------------------------------------------------------------------------------


@torch.no_grad()
def _call(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    method = getattr(module, name, None)
    if method is None:
        raise TypeError(
            f"a {type(module).__name__} has no method {name}, which this figure needs: pass a VAE, "
            "or a module with one"
        )
    return method(*args, **kwargs)


def _grid(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """The width of the gap between pictures, and the height and width of a cell."""
    gap = max(1, round(max(image_shape) / 16))
    return gap, image_shape[0] + gap, image_shape[1] + gap


def _images(
    x: Float[Tensor, "batch pixels"], image_shape: Sequence[int]
) -> Float[Tensor, "batch rows columns"]:
    if len(image_shape) != 2 or math.prod(image_shape) != x.shape[1]:
        raise ValueError(
            f"rows of {x.shape[1]} numbers are not images of {' x '.join(map(str, image_shape))} "
            "pixels: pass the data set's image_shape"
        )
    return x.detach().cpu().float().reshape(-1, *image_shape)


_PIXELS = {
    "ink": ("gray_r", "Pixels are drawn as ink on paper: 0 is white and 1 is black."),
    "light": ("gray", "Pixels are drawn as light: 0 is black and 1 is white."),
}


def pixels_text(pixels: str) -> str:
    """A sentence for beneath images: what black and white stand for.

    Args:
        pixels: What a pixel counts, "ink" or "light", see `Dataset`.

    Raises:
        ValueError: If it is neither.
    """
    return _pixels(pixels)[1]


def _look_of(pixels: str) -> dict[str, Any]:
    """How images with pixels from 0 to 1 are drawn."""
    return {"cmap": _pixels(pixels)[0], "vmin": 0, "vmax": 1, "interpolation": "nearest"}


def _pixels(pixels: str) -> tuple[str, str]:
    if pixels not in _PIXELS:
        raise ValueError(f"pixels is {pixels!r}, but must be 'ink' or 'light', as in Dataset")
    return _PIXELS[pixels]


def _show(
    ax: Axes | None,
    images: Float[Tensor, "down across rows columns"],
    size: tuple[float, float],
    pixels: str = "ink",
) -> Axes:
    """Shows images as one picture, each followed by a gap below and to the right."""
    ax = _axes(ax, size)
    gap, height, width = _grid(images.shape[2:])
    down, across = images.shape[:2]
    whole = torch.full((down, across, height, width), math.nan)
    whole[:, :, : height - gap, : width - gap] = images
    mosaic = whole.transpose(1, 2).reshape(down * height, across * width)
    mosaic = mosaic[:-gap, :-gap]
    ax.imshow(mosaic.numpy(), **_look_of(pixels))
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    return ax


# --- the gap --------------------------------------------------------------------------------------


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
