"""Figures of pictures: reconstructions, draws, manifolds, codes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from torch import Tensor, nn

from pyro_vae.checks import check_count
from pyro_vae.data import Seed, as_seed
from pyro_vae.plots.style import _CLASSES, _GREY, _MARKERS, _SQUARE, _axes, _thousands, _title

__all__ = ["pixels_text", "plot_latent", "plot_manifold", "plot_reconstructions", "plot_samples"]


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
