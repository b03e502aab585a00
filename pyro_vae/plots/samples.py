"""Figures of generated samples, in the manner of `pyro_vae.plots.style`."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from pyro_vae.extras.samples import PowerSpectrum
from pyro_vae.plots.images import _grid, _images, _show
from pyro_vae.plots.style import _GREY, _WIDE, _axes, _legend_below, _sign, _title

__all__ = ["plot_power", "plot_sample_rows", "plot_sharpness"]


def plot_sample_rows(
    images: Mapping[str, Float[Tensor, "_ pixels"]],
    image_shape: Sequence[int],
    ax: Axes | None = None,
    *,
    num_images: int = 16,
    data: str = "",
    pixels: str = "ink",
) -> Axes:
    """Shows images of several sources, a row each.

    Args:
        images: By the source's name, images as rows; the first so many are shown.
        image_shape: Rows and columns of an image.
        ax: Where to draw; a new figure if None.
        num_images: Images of each source; fewer where a source has fewer.
        data: The name of the data, for the title.
        pixels: What a pixel counts, see `Dataset`: "ink" is drawn black, "light" white.

    Raises:
        ValueError: If there is no source, or the rows are not images of that shape.
    """
    if not images:
        raise ValueError("there are no images to show: pass at least one source")
    count = min(num_images, *(len(x) for x in images.values()))
    rows = torch.stack([_images(x[:count], image_shape) for x in images.values()])
    _, height, _ = _grid(image_shape)
    size = (0.5 * count + 2.2, 0.5 * len(images) + 0.6)
    ax = _show(ax, rows, size, pixels)
    ax.set_yticks([height * (i + 0.5) - 0.5 for i in range(len(images))], list(images))
    ax.set_xticks([])
    ax.tick_params(axis="y", length=0)
    ax.set_title(_title("Samples by generator", data, "means of p(x | z)"))
    return ax


def plot_sharpness(
    found: Mapping[str, tuple[float, float, float]], ax: Axes | None = None, *, data: str = ""
) -> Axes:
    """Held-out log density against Frechet distance: is the likelier generator the better one?

    Args:
        found: By generator: held-out log p(x) in nats per datum, squared Frechet distance, and the
            standard error of that.
        ax: Where to draw; a new figure if None.
        data: The name of the data, for the title.
    """
    ax = _axes(ax, (7.2, 5.4))
    for i, (name, (evidence, distance, error)) in enumerate(found.items()):
        colour, marker = _sign(i)
        ax.errorbar(
            evidence, distance, yerr=error, color=colour, marker=marker, linestyle="", label=name
        )
    ax.set_yscale("log")
    ax.set_xlabel("log p(x) of held-out data, at least [nats per datum] (right is better)")
    ax.set_ylabel("squared Frechet distance of means (down is better)")
    ax.set_title(_title("Likelihood against samples", data, "bars: one standard error"))
    _legend_below(ax)
    return ax


def plot_power(
    spectra: Mapping[str, PowerSpectrum], ax: Axes | None = None, *, data: str = ""
) -> Axes:
    """Power of images at each spatial frequency, from `high_frequency_power`.

    Args:
        spectra: By source; the first is the reference, drawn in grey and thick.
        ax: Where to draw; a new figure if None.
        data: The name of the data, for the title.
    """
    ax = _axes(ax, _WIDE)
    for i, (name, spectrum) in enumerate(spectra.items()):
        colour, marker = (_GREY, "") if i == 0 else _sign(i - 1)
        ax.plot(
            spectrum.frequency.numpy(),
            spectrum.power.numpy(),
            color=colour,
            marker=marker,
            linewidth=4 if i == 0 else 1.5,
            label=name,
        )
    cutoff = next(iter(spectra.values())).cutoff
    ax.axvline(cutoff, color=_GREY, linestyle=":", linewidth=1)
    ax.annotate(
        "high\nfrequencies",
        (cutoff, 0.98),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        va="top",
        color=_GREY,
    )
    ax.set_yscale("log")
    ax.set_xlabel("spatial frequency [cycles per pixel]")
    ax.set_ylabel("power")
    ax.set_title(_title("Power spectrum of the means", data, "mean over images and directions"))
    _legend_below(ax)
    return ax
