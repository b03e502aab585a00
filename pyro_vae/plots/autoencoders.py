"""Figures of autoencoders: what denoising restores, how sparse codes are, what they respond to."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyro
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn

from pyro_vae.data import Seed, as_seed
from pyro_vae.extras.latents import code_activity
from pyro_vae.inference.programs import keep_random_state
from pyro_vae.models import Denoising
from pyro_vae.plots.images import _call, _grid, _images, _show
from pyro_vae.plots.style import _BLUE, _GREY, _ORANGE, _axes, _title
from pyro_vae.results import Result

__all__ = ["plot_code_activity", "plot_denoising", "plot_sensitivity"]

_MANY_UNITS = 17  # from which bars have no room for names


def plot_denoising(
    module: nn.Module,
    x: Float[Tensor, "batch pixels"],
    image_shape: Sequence[int],
    ax: Axes | None = None,
    *,
    corruption: Denoising | None = None,
    num_images: int = 12,
    seed: Seed = 0,
    data: str = "",
    pixels: str = "ink",
) -> Axes:
    """Shows clean images, what noise makes of them, and what the autoencoder restores.

    Args:
        module: A trained `Autoencoder`, or a module with a method `reconstruct(x)`.
        x: Clean images, a row each.
        image_shape: Rows and columns of an image.
        ax: Where to draw; a new figure if None.
        corruption: The noise; None for the kind of the module, if that is `Denoising`.
        num_images: The first so many are shown; errors are those of all.
        seed: Seeds the noise; torch's random state is left alone.
        data: The name of the data, for the title.
        pixels: What a pixel counts, see `Dataset`: "ink" is drawn black, "light" white.

    Returns:
        The axes with one picture of three rows, whose names have the root mean square error
        against the clean images.

    Raises:
        TypeError: If the module cannot reconstruct.
        ValueError: If there is no noise to add, or the rows are not images of that shape.
    """
    noise = getattr(module, "kind", None) if corruption is None else corruption
    if not isinstance(noise, Denoising):
        raise ValueError("the module is no denoising autoencoder: pass corruption=Denoising(...)")
    with keep_random_state():
        pyro.set_rng_seed(as_seed(seed))
        noisy = noise.corrupt(x)
    restored = _call(module, "reconstruct", noisy)
    rows = {"clean": x, "noisy": noisy, "denoised": restored}
    shown = torch.stack([_images(part[:num_images], image_shape) for part in rows.values()])
    ax = _show(ax, shown, (min(0.75 * shown.shape[1] + 1.4, 10.0), 2.9), pixels)
    _, height, _ = _grid(image_shape)
    names = ["clean"]
    for name in ("noisy", "denoised"):
        error = float((rows[name] - x).detach().square().mean().sqrt())
        names.append(f"{name}\nerror {error:.2f}")
    ax.set_yticks([(i + 0.5) * height - 0.5 for i in range(3)], names)
    ax.set_xticks([])
    kind = "masked with probability" if noise.noise == "mask" else "noise of standard deviation"
    about = f"{kind} {noise.level:g}"
    ax.set_title(_title("What a denoising autoencoder restores", data, about))
    return ax


def plot_code_activity(
    codes: Float[Tensor, "data code"],
    *,
    rate: float | None = None,
    threshold: float | None = None,
    data: str = "",
) -> Figure:
    """Plots how far from zero each unit of a code is, how often, and all activations together.

    Args:
        codes: Of some data, such as `autoencoder.encode(x)`.
        rate: Of the Laplace prior (`Sparse.strength`), whose targets and density are drawn.
        threshold: Where a unit counts as active, see `code_activity`.
        data: The name of the data, for the title.

    Returns:
        A figure of three axes: mean activation by unit and share of data by unit, most first, each
        with the target as a dashed line, and the histogram on a logarithmic axis.

    Raises:
        ValueError: As `code_activity`.
    """
    found = code_activity(codes, threshold=threshold, rate=rate)
    figure = Figure(figsize=(11.0, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for ax, name, target, what in (
        (left, "mean_activation", "target_activation", "mean of $|h|$"),
        (middle, "active_share", "target_share", "share of data"),
    ):
        values = found[name].values
        order = np.argsort(-values)
        ax.bar(range(len(order)), values[order], color=_BLUE, width=0.8)
        if target in found:
            level = float(found[target])
            ax.axhline(level, color=_ORANGE, ls="--", lw=1.6, label=f"prior's target: {level:.3g}")
        ax.axhline(values.mean(), color=_GREY, lw=1.2, ls=":", label=f"mean: {values.mean():.3g}")
        if len(order) < _MANY_UNITS:
            ax.set_xticks(range(len(order)), [str(i + 1) for i in order], fontsize="small")
        ax.set_xlabel("unit, most first")
        ax.set_ylabel(what)
        ax.set_ylim(0, 1.35 * max(values.max(), float(found.get(target, 0.0))))
        ax.legend(fontsize="small", loc="upper right")
    left.set_title("mean activation", fontsize="medium")
    middle.set_title(f"active: $|h|$ above {float(found['threshold']):.2g}", fontsize="medium")
    middle.set_yticks([0, 0.25, 0.5, 0.75, 1])
    middle.yaxis.set_major_formatter(PercentFormatter(1.0))
    _histogram(right, codes.detach().double().cpu().numpy().ravel(), rate)
    sparseness = float(np.nanmean(found["hoyer"].values))
    figure.suptitle(_title("Activations of the code", data, f"Hoyer sparseness {sparseness:.2f}"))
    return figure


def _histogram(ax: Axes, values: np.ndarray, rate: float | None) -> None:
    """All activations, under the density of the prior."""
    reach = float(np.quantile(np.abs(values), 0.999)) or 1.0
    edges = np.linspace(-reach, reach, 61)
    heights, _ = np.histogram(values, edges)
    density = heights / (len(values) * (edges[1] - edges[0]))
    ax.stairs(density, edges, fill=True, color=_BLUE, alpha=0.75, label="codes")
    if rate is not None:
        across = np.linspace(-reach, reach, 401)
        ax.plot(across, rate / 2 * np.exp(-rate * np.abs(across)), color=_ORANGE, lw=1.6, ls="--")
        ax.lines[-1].set_label(f"Laplace prior, rate {rate:g}")
    ax.set_yscale("log")
    ax.set_ylim(top=20 * max(density.max(), (rate or 0.0) / 2))  # room for the legend
    ax.set_xlabel("activation $h$")
    ax.set_ylabel("density")
    ax.set_title("all units together", fontsize="medium")
    ax.legend(fontsize="small", loc="upper right")


def plot_sensitivity(
    results: Mapping[str, Result], ax: Axes | None = None, *, data: str = ""
) -> Axes:
    """Plots how far codes move along the data's manifold and across it, an encoder a row.

    Args:
        results: From `directional_sensitivity`, by the encoder's name.
        ax: Where to draw; a new figure if None.
        data: The name of the data, for the title.

    Returns:
        The axes, with a cloud of data and a bar at the median for along and for across.

    Raises:
        ValueError: If there are no results.
    """
    if not results:
        raise ValueError("there is nothing to show: pass at least one result")
    ax = _axes(ax, (7.4, 0.85 * len(results) + 1.8))
    for place, result in enumerate(results.values()):
        for name, colour, side in (("along", _BLUE, -0.17), ("across", _ORANGE, 0.17)):
            values = result[name].values
            spread = side + 0.1 * np.sin(np.arange(len(values)) * 2.4)  # the same in every drawing
            ax.plot(values, place + spread, ".", color=colour, alpha=0.35, ms=4, mew=0)
            middle = float(np.median(values))
            label = f"{name} the manifold" if place == 0 else None
            ax.plot([middle] * 2, [place + side - 0.13, place + side + 0.13], color=colour, lw=3)
            ax.lines[-1].set_label(label)
            ax.annotate(
                f"{middle:.2g}",
                (middle, place + side),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize="small",
                color="black",
                bbox={"facecolor": "white", "alpha": 0.75, "pad": 0.8, "lw": 0},
            )
    ax.set_xscale("log")
    ax.set_ylim(len(results) - 0.5, -0.5)
    ratios = [float(np.median(result["ratio"].values)) for result in results.values()]
    ax.set_yticks(
        range(len(results)),
        [f"{name}\nratio {ratio:.3g}" for name, ratio in zip(results, ratios, strict=True)],
    )
    ax.set_xlabel("how far a unit step of $x$ moves the output, root mean square over directions")
    ax.set_title(_title("Sensitivity along and across the data", data, "bars are medians"))
    ax.grid(alpha=0.25, lw=0.6, axis="x")
    handles, labels = ax.get_legend_handles_labels()
    ax.figure.legend(
        handles, labels, loc="outside lower center", ncols=2, fontsize="small", frameon=False
    )
    return ax
