"""Figures of `analyses.posterior_quality`: exact posteriors on grids, and panels by guide."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from analyses.pages import figure_of
from analyses.posterior_quality.verdict import Measured, per_datum, with_sign
from pyro_vae import VAE
from pyro_vae.data import Dataset
from pyro_vae.inference.mcmc import PosteriorSample
from pyro_vae.inference.programs import program_scope, unconstrained_model
from pyro_vae.plots import (
    plot_calibration,
    plot_coverage,
    plot_khat,
    plot_khat_by_class,
    plot_khat_plane,
    plot_posterior,
    plot_trust,
    plot_worst,
)
from pyro_vae.results import Result

_DRAWS_SHOWN = 400


# --- grids ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Both densities of one datum on a grid that holds all draws.

    Attributes:
        across: Values of the first latent.
        up: Values of the second.
        log_joint: log p(x, z), `[rows, columns]`.
        log_guide: log q(z | x), `[rows, columns]`.
        draws: Of the reference.
    """

    across: Tensor
    up: Tensor
    log_joint: Tensor
    log_guide: Tensor
    draws: Tensor

    def moments(self) -> tuple[Tensor, Tensor]:
        """Posterior means and standard deviations by the grid."""
        shares = torch.softmax(self.log_joint.double().flatten(), 0).reshape(self.log_joint.shape)
        means, sds = [], []
        for values, margin in ((self.across, shares.sum(0)), (self.up, shares.sum(1))):
            mean = (values.double() * margin).sum()
            means.append(mean)
            sds.append((((values.double() - mean) ** 2) * margin).sum().sqrt())
        return torch.stack(means), torch.stack(sds)

    def error_of_draws(self) -> float:
        """The largest error of the draws' means against the grid's, in posterior sds."""
        mean, sd = self.moments()
        return float(((self.draws.double().mean(0) - mean) / sd).abs().max())


def on_grid(vae: VAE, x: Tensor, datum: int, reference: PosteriorSample, steps: int) -> Grid:
    """Evaluates both densities of one datum where the reference or the guide draws."""
    draws = reference.unconstrained[:, :, datum].flatten(0, 1)
    with torch.no_grad(), program_scope(0):
        # Where q is, too: quantiles of draws, so that a single far one does not stretch the grid.
        own = vae.encode(x[datum : datum + 1]).sample((1000,))[:, 0]
        ends = torch.tensor([0.002, 0.998], dtype=draws.dtype)
        both = [torch.quantile(z.to(draws), ends, 0) for z in (draws, own)]
    low, high = (
        pick(*(z[i] for z in both)) for i, pick in ((0, torch.minimum), (1, torch.maximum))
    )
    centre, half = (low + high) / 2, (high - low).max() * 0.65
    across, up = (torch.linspace(float(c - half), float(c + half), steps) for c in centre)
    points = torch.stack(torch.meshgrid(across, up, indexing="xy"), -1).reshape(-1, 1, 2)
    with torch.no_grad(), program_scope(0):
        latent_model = unconstrained_model(vae.model, vae.guide, x[datum : datum + 1])
        found = latent_model.log_densities(points.to(draws), "guide")
    shape = (steps, steps)
    return Grid(across, up, found.joint.reshape(shape), found.start.reshape(shape), draws)


def chosen_data(quality: Result) -> dict[str, dict[str, int]]:
    """The best, the median and the worst datum, by k-hat and by KL(q || p)."""
    chosen = {}
    for title, name in (("k-hat", "khat"), ("KL(q || p)", "kl")):
        values = per_datum(quality, name)
        order = np.argsort(np.where(np.isnan(values), np.inf, values), kind="stable").tolist()
        chosen[title] = {
            "best": order[0],
            "median": order[(len(order) - 1) // 2],
            "worst": order[-1],
        }
    return chosen


def of_grids(grids: Sequence[Grid]) -> str:
    """How well HMC agrees with the grids."""
    errors = [grid.error_of_draws() for grid in grids]
    return (
        f"The means of HMC are at most {max(errors):.2f} posterior sds from those of the grids, in "
        f"all {len(errors)} posteriors shown."
    )


def describe_datum(quality: Result, datum: int) -> str:
    """k-hat and KL of one datum."""
    khat, kl = (float(quality[n][datum]) for n in ("khat", "kl_guide_posterior"))
    return f"k-hat {khat:.2f}, KL {kl:.2f}"


# --- figures --------------------------------------------------------------------------------------


def draw(
    found: Sequence[Measured], data: Dataset, x: Tensor, reference: PosteriorSample, grid_steps: int
) -> dict[str, Any]:
    """The figures by name, and what the page says of their grids."""
    assert data.image_shape is not None
    base, pictures = found[0], x.reshape(-1, *data.image_shape)
    chosen = chosen_data(base.quality)
    beside = [
        (
            f"{which} {by}, datum {n}\n{describe_datum(base.quality, n)}",
            on_grid(base.vae, x, n, reference, grid_steps),
            pictures[n],
        )
        for by, places in chosen.items()
        for which, n in places.items()
    ]
    worst = chosen["KL(q || p)"]["worst"]
    mended = [
        (
            f"{m.case.title}\n{describe_datum(m.quality, worst)}",
            on_grid(m.vae, x, worst, reference, grid_steps),
            pictures[worst] if m is base else None,
        )
        for m in found
    ]
    labels = None if data.test_labels is None else data.test_labels[: len(x)]
    hardest = plot_worst(base.quality, x, data.image_shape, by="kl_guide_posterior")
    return {
        "agreement": of_grids([grid for _, grid, _ in beside]),
        "table": figure_of(plot_trust({m.case.title: m.quality for m in found})),
        "khat": draw_khat(base.quality, labels, data),
        "posteriors": draw_posteriors(beside, 3, f"The base's posteriors, {data.name}"),
        "mended": draw_posteriors(mended, min(4, len(mended)), f"Datum {worst}"),
        "calibration": draw_calibration(found),
        "coverage": draw_coverage(found),
        "worst": hardest,
    }


def draw_khat(quality: Result, labels: Tensor | None, data: Dataset) -> Figure:
    """k-hat over the data, by class and on the latent plane."""
    columns = 2 if labels is None else 3
    figure = Figure(figsize=(5.4 * columns, 4.6), layout="constrained")
    axes = figure.subplots(1, columns)
    plot_khat(quality, axes[0], data=data.name)
    plot_khat_plane(quality, axes[1])
    if labels is not None:
        plot_khat_by_class(quality, labels, axes[2], label_names=data.label_names)
    return figure


def draw_posteriors(
    grids: Sequence[tuple[str, Grid, Tensor | None]], columns: int, title: str
) -> Figure:
    """Posteriors on their grids, each with its title and picture."""
    rows = math.ceil(len(grids) / columns)
    figure = Figure(figsize=(3.9 * columns, 3.9 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in panels[len(grids) :]:
        ax.set_axis_off()
    for ax, (name, grid, picture) in zip(panels, grids, strict=False):
        thin = max(1, len(grid.draws) // _DRAWS_SHOWN)
        plot_posterior(
            grid.across,
            grid.up,
            grid.log_joint,
            grid.log_guide,
            grid.draws[::thin],
            ax,
            title=name,
            picture=picture,
        )
    handles = panels[0].get_legend().legend_handles
    for ax in panels[: len(grids)]:
        ax.get_legend().remove()
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize="medium")
    return figure


def draw_calibration(found: Sequence[Measured]) -> Figure:
    """Ranks, a panel for each guide."""
    columns = min(4, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(3.5 * columns, 2.8 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax in panels[len(found) :]:
        ax.set_axis_off()
    for ax, measured in zip(panels, found, strict=False):
        p = float(measured.quality["overall_p_value"])
        title = f"{measured.case.title}, {with_sign(p)}"
        plot_calibration(measured.quality, ax, title=title, legend=False)
        ax.label_outer()
    for ax in panels[max(len(found) - columns, 0) : len(found)]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("rank, as a share")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def draw_coverage(found: Sequence[Measured]) -> Figure:
    """Coverage, a panel for each latent."""
    results = {m.case.title: m.quality for m in found}
    latents = [str(name) for name in found[0].quality["latent"].values]
    figure = Figure(figsize=(5.2 * len(latents), 4.4), layout="constrained")
    panels = figure.subplots(1, len(latents), squeeze=False, sharey=True).ravel()
    for ax, latent in zip(panels, latents, strict=True):
        plot_coverage(results, ax, latent=latent, legend=False)
        ax.label_outer()
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    return figure
