"""Figures of mixtures and of the bound that EM and its variants maximise.

In the manner of `figures`: every function takes what it shows and, if wanted, the `Axes` to
draw on, and returns the `Axes`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle, Ellipse, Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullFormatter
from torch import Tensor

from pyro_vae.models import VAE, GaussianMixture
from pyro_vae.models.parts import Gaussian
from pyro_vae.plots.style import _BLUE, _CLASSES, _GREY, _ORANGE, _SQUARE, _WIDE, _axes, _sign

__all__ = [
    "plot_bounds",
    "plot_decoder",
    "plot_evidence_parts",
    "plot_half_steps",
    "plot_mixture",
    "plot_model_choice",
    "plot_num_components",
    "plot_restarts",
]

_SAME_END = 1e-3  # nats per datum: ends closer than this are one optimum
_MAX_ENDS = 6  # optima with a colour of their own
_MOST_ASPECT = 4.0  # of two columns' ranges, up to which their units are drawn alike
_STYLES = ("-", "--", "-.", ":")
_COMPONENTS = (_BLUE, _ORANGE, *_CLASSES)
_LEAST = 1e-10  # nats per datum: below, distances to the maximum are rounding


# --- models ---------------------------------------------------------------------------------------


def plot_mixture(
    mixture: GaussianMixture,
    x: Float[Tensor, "batch features"],
    ax: Axes | None = None,
    *,
    features: tuple[int, int] = (0, 1),
    names: Sequence[str] = (),
    responsibilities: bool = True,
    title: str = "",
) -> Axes:
    """Shows data and the ellipses of the components, one and two standard deviations wide.

    A datum has the colours of the components mixed by its responsibilities. With more than two
    features the ellipses are those of the two chosen ones, whatever the others are.

    Args:
        mixture: The mixture.
        x: The data.
        ax: Where to draw; a new figure if None.
        features: The features across and up.
        names: The names of all features, for the axes.
        responsibilities: Whether data are coloured by them; grey otherwise, as before the first E
            step.
        title: The title.

    Returns:
        The axes, with two ellipses for each component; their numbers stand at the means.

    References:
        Bishop (2006), Pattern Recognition and Machine Learning.
    """
    ax = _axes(ax, _SQUARE)
    pair = list(features)
    shown = x.detach().cpu()[:, pair].numpy()
    colours = np.array(
        [to_rgb(_COMPONENTS[k % len(_COMPONENTS)]) for k in range(len(mixture.locs))]
    )
    if responsibilities:
        mixed = mixture.predict_proba(x).cpu().numpy() @ colours
    else:
        mixed = np.broadcast_to(to_rgb(_GREY), (len(shown), 3))
    ax.scatter(shown[:, 0], shown[:, 1], s=13, c=mixed.clip(0, 1), alpha=0.6, linewidths=0)
    locs = mixture.locs.detach().cpu().numpy()[:, pair]
    covariances = mixture.dense_covariances.detach().cpu()[:, pair][:, :, pair]
    for k, (loc, covariance) in enumerate(zip(locs, covariances, strict=True)):
        values, vectors = torch.linalg.eigh(covariance)
        sides = 2 * values.clamp_min(0).sqrt()
        angle = math.degrees(math.atan2(float(vectors[1, 1]), float(vectors[0, 1])))
        for width in (1, 2):
            ellipse = Ellipse(
                (float(loc[0]), float(loc[1])),
                width * float(sides[1]),
                width * float(sides[0]),
                angle=angle,
                fill=False,
                edgecolor=colours[k],
                lw=2.0 / width,
            )
            ax.add_patch(ellipse)
        ax.text(
            float(loc[0]),
            float(loc[1]),
            str(k + 1),
            ha="center",
            va="center",
            fontweight="bold",
            color=colours[k],
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    across, up = np.ptp(shown, axis=0)
    if 1 / _MOST_ASPECT < across / max(up, 1e-300) < _MOST_ASPECT:  # else a strip
        ax.set_aspect("equal", adjustable="box")
    ax.autoscale_view()
    _name_features(ax, features, names)
    ax.set_title(title)
    return ax


@torch.no_grad()
def plot_decoder(
    vae: VAE,
    x: Float[Tensor, "batch features"],
    ax: Axes | None = None,
    *,
    features: tuple[int, int] = (0, 1),
    names: Sequence[str] = (),
    num_components: int = 25,
    title: str = "",
) -> Axes:
    """Shows a VAE with one latent as a mixture whose components lie along a curve.

    The curve is the mean of p(x | z). Circles of one standard deviation stand at values of z that
    are even in prior probability, so each stands for the same share of the data.

    Args:
        vae: With one latent, a standard normal prior and a Gaussian likelihood of one scale.
        x: The data.
        ax: Where to draw; a new figure if None.
        features: The features across and up.
        names: The names of all features, for the axes.
        num_components: How many circles.
        title: The title.

    Returns:
        The axes, with a line and so many circles.

    Raises:
        ValueError: If the VAE has more than one latent, or another likelihood.
    """
    likelihood = vae.likelihood
    if vae.latent_dim != 1 or not isinstance(likelihood, Gaussian):
        raise ValueError(
            f"a curve is drawn for 1 latent and a Gaussian likelihood, not for {vae.latent_dim} "
            f"and {type(likelihood).__name__}: use plot_samples"
        )
    ax = _axes(ax, _SQUARE)
    pair = list(features)
    like = next(vae.parameters())
    shares = (torch.arange(num_components, dtype=torch.float64) + 0.5) / num_components
    centres = torch.special.ndtri(shares).to(like)[:, None]
    along = torch.linspace(-3, 3, 400).to(like)[:, None]
    curve = vae.decode(along).cpu()[:, pair].numpy()
    scales = likelihood.distribution(vae.decoder(centres)).stddev[:, pair].mean(1)
    shown = x.detach().cpu()[:, pair].numpy()
    ax.scatter(shown[:, 0], shown[:, 1], s=13, color=_GREY, alpha=0.5, linewidths=0, label="data")
    ax.plot(curve[:, 0], curve[:, 1], color=_ORANGE, lw=2, label="mean of p(x | z), z from -3 to 3")
    for centre, scale in zip(vae.decode(centres).cpu()[:, pair].tolist(), scales, strict=True):
        ax.add_patch(
            Circle((centre[0], centre[1]), float(scale), fill=False, edgecolor=_BLUE, lw=0.9)
        )
    handles, _ = ax.get_legend_handles_labels()
    circle = Patch(fill=False, edgecolor=_BLUE, label=f"1/{num_components} of p(z), one s.d.")
    ax.legend(handles=[*handles, circle], fontsize="small")
    ax.set_aspect("equal", adjustable="box")
    ax.autoscale_view()
    _name_features(ax, features, names)
    ax.set_title(title)
    return ax


def _name_features(ax: Axes, features: tuple[int, int], names: Sequence[str]) -> None:
    if names:
        ax.set_xlabel(names[features[0]])
        ax.set_ylabel(names[features[1]])


# --- the bound ------------------------------------------------------------------------------------


def plot_half_steps(
    history: xr.Dataset, ax: Axes | None = None, *, first: int = 0, num_steps: int = 13
) -> Axes:
    """Plots the staircase of E and M steps under the log-likelihood.

    M steps raise log p(x) (the upper line) and, by less, the bound; what opens between them is the
    KL (the band), which the next E step closes by lifting the bound.

    Args:
        history: Of `fit_em`, dimension `step`.
        ax: Where to draw; a new figure if None.
        first: The half step to begin with.
        num_steps: So many rows are shown.

    Returns:
        The axes, with a line for log p(x) and one for each half step of the bound.
    """
    ax = _axes(ax, (7.2, 4.6))
    chosen = history.isel(step=slice(first, first + num_steps))
    step, evidence = chosen["step"].values, chosen["log_evidence"].values
    bound, phase = chosen["bound"].values, chosen["phase"].values
    ax.plot(step, evidence, color=_GREY, lw=1.6, label="log p(x)")
    ax.fill_between(step, bound, evidence, color=_GREY, alpha=0.2, lw=0, label="KL")
    named = set()
    for i in range(1, len(step)):
        of_e = phase[i] == "E"
        ax.plot(
            step[i - 1 : i + 1],
            bound[i - 1 : i + 1],
            "-" if of_e else "--",
            color=_BLUE if of_e else _ORANGE,
            lw=2.2,
            label=None if of_e in named else f"ELBO, {'E' if of_e else 'M'} step",
        )
        named.add(of_e)
    for of_e, marker, colour in ((True, "o", _BLUE), (False, "s", _ORANGE)):
        use = (phase == "E") == of_e
        ax.plot(step[use], bound[use], marker, color=colour, ms=5, zorder=3)
    iteration = chosen["iteration"].values
    ax.set_xticks(step, [f"{p}\n{n}" for p, n in zip(phase, iteration, strict=True)])
    ax.set_xlabel("half step and iteration")
    ax.set_ylabel("nats per datum")
    ax.set_title("The staircase under log p(x)")
    ax.grid(alpha=0.25, lw=0.6, axis="y")
    ax.legend(fontsize="small", loc="lower right")
    return ax


def plot_evidence_parts(
    parts: xr.Dataset, names: Sequence[str], ax: Axes | None = None, *, title: str = ""
) -> Axes:
    """Draws log p(x) = ELBO + KL as a bar for each stage, all from one floor.

    Densities have no zero to start from, so the bars start a little below the lowest ELBO: their
    ends and the lengths of the KL compare, the lengths of the ELBO do not.

    Args:
        parts: With `log_evidence`, `bound` (the ELBO) and `gap` (the KL) over one dimension, nats
            per datum. Where log p(x) is a lower bound by its label, so is the KL, and it is said.
        names: The names of the stages, from the top.
        ax: Where to draw; a new figure if None.
        title: The title.

    Returns:
        The axes, with two bars for each stage.
    """
    ax = _axes(ax, (7.6, 0.42 * len(names) + 1.7))
    place = np.arange(len(names))[::-1]
    bound, gap = parts["bound"].values, parts["gap"].values
    top = float(parts["log_evidence"].values.max())
    spread = max(top - float(bound.min()), 1e-3)
    floor = float(bound.min()) - 0.35 * spread
    sure = parts["log_evidence"].attrs.get("bound") == "exact"
    ax.barh(place, bound - floor, left=floor, color=_BLUE, height=0.62, label="ELBO")
    ax.barh(
        place,
        gap,
        left=bound,
        color="#F2C9A8",
        edgecolor=_ORANGE,
        hatch="///",
        height=0.62,
        label="KL" if sure else "KL, estimated from below",
    )
    for at, low, kl in zip(place, bound, gap, strict=True):
        text: dict[str, Any] = {"va": "center", "fontsize": "small", "zorder": 4}
        ax.text(floor + 0.02 * spread, at, f"{low:.4f}", color="white", **text)
        sign = "" if sure else "≥ "
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # covers the dotted line
        ax.text(low + kl + 0.02 * spread, at, f"KL {sign}{_small(kl)}", bbox=behind, **text)
    ax.axvline(top, color=_GREY, lw=1, ls=":", zorder=0)
    ax.set_xlim(floor, top + 0.45 * spread)
    ax.set_yticks(place, list(names))
    ax.set_xlabel("nats per datum (the bars start at no particular zero)")
    ax.set_title(title or "log p(x) = ELBO + KL")
    ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return ax


def _small(value: float) -> str:
    """Four decimals, or a power of ten where these would be zeros."""
    if abs(value) < 1e-12:
        return "0"
    return f"{value:.4f}" if abs(value) >= 5e-5 else f"{value:.0e}"


def plot_bounds(
    bounds: xr.Dataset,
    ax: Axes | None = None,
    *,
    against: str = "data_passes",
    best: float | None = None,
    legend: bool = True,
    among: Sequence[str] = (),
) -> Axes:
    """Plots the bound of several methods against data passes or seconds.

    Args:
        bounds: Rows (dimension `row`) with the coordinate `method`, the variables `bound` and
            `log_evidence` in nats per datum, and `data_passes` and `seconds`.
        ax: Where to draw; a new figure if None.
        against: "data_passes" or "seconds".
        best: If given, how far the bound lies below this number is drawn, on a logarithmic axis.
            Otherwise the bound itself, with log p(x) thin above it.
        legend: Whether to draw the legend.
        among: The methods of all figures beside this one, so that each keeps its colour in all.

    Returns:
        The axes, with a line for the bound of each method (and one for its log p(x)).
    """
    ax = _axes(ax, _WIDE)
    methods = bounds["method"].values
    places = {name: i for i, name in enumerate(dict.fromkeys([*among, *methods.tolist()]))}
    for name in dict.fromkeys(methods.tolist()):
        i = places[name]
        rows = bounds.isel(row=np.flatnonzero(methods == name))
        across = rows[against].values
        colour, marker = _sign(i)
        bound = rows["bound"].values
        look: dict[str, Any] = {"color": colour, "ls": _STYLES[i % len(_STYLES)], "lw": 1.6}
        thin = max(1, len(across) // 8)
        marks: dict[str, Any] = {"marker": marker, "ms": 5, "markevery": (i % thin, thin)}
        if best is None:
            ax.plot(across, bound, label=name, zorder=3, **look, **marks)
            ax.plot(across, rows["log_evidence"].values, color=colour, lw=0.7, alpha=0.8)
        else:
            below = np.maximum(best - bound, _LEAST)
            ax.plot(across, below, label=name, zorder=3, **look, **marks)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel({"data_passes": "passes over the data", "seconds": "seconds"}[against])
    if best is None:
        ax.set_ylabel("bound, nats per datum")
    else:
        ax.set_yscale("log")
        ax.set_ylabel("bound below the maximum,\nnats per datum")
    ax.grid(alpha=0.25, lw=0.6)
    if legend:
        ax.legend(fontsize="small")
    return ax


# --- choices --------------------------------------------------------------------------------------


def plot_restarts(
    restarts: xr.Dataset, ax: Axes | None = None, *, title: str = "Restarts and local optima"
) -> Axes:
    """Plots log p(x) against iterations for many starts, with how many ended where.

    Args:
        restarts: `log_evidence` over `start` and `iteration`, nats per datum.
        ax: Where to draw; a new figure if None.
        title: The title.

    Returns:
        The axes, with a line for each start; starts that ended within 0.001 nats per datum of each
        other have one colour and one entry in the legend, the best first; after six such
        groups the rest are grey.
    """
    ax = _axes(ax, _WIDE)
    paths = restarts["log_evidence"].transpose("start", "iteration").values
    iteration = restarts["iteration"].values
    order = np.argsort(-paths[:, -1])
    group, reached = -1, math.inf
    members: dict[int, list[int]] = {}
    for i in order:
        if reached - paths[i, -1] > _SAME_END:
            group, reached = group + 1, paths[i, -1]
        members.setdefault(group, []).append(i)
    for which, starts in members.items():
        colour = _sign(which)[0] if which < _MAX_ENDS else _GREY
        text = f"{paths[starts[0], -1]:.4f}: {len(starts)} of {len(paths)}"
        if which == _MAX_ENDS:
            rest = sum(len(members[other]) for other in members if other >= which)
            text = f"lower: {rest} of {len(paths)}"
        for n, i in enumerate(starts):
            ax.plot(
                iteration,
                paths[i],
                _STYLES[which % len(_STYLES)] if which < _MAX_ENDS else "-",
                color=colour,
                lw=1.1 if which < _MAX_ENDS else 0.7,
                alpha=0.85,
                zorder=3 if which == 0 else 2,
                label=text if n == 0 and which <= _MAX_ENDS else None,
            )
    ends = paths[:, -1]
    room = max(float(ends.max() - np.median(paths[:, min(2, len(iteration) - 1)])), 1e-3)
    ax.set_ylim(float(ends.max()) - 1.3 * room, float(ends.max()) + 0.1 * room)
    ax.set_xlim(left=1)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("iteration of EM")
    ax.set_ylabel("log p(x), nats per datum")
    ax.set_title(title)
    ax.grid(alpha=0.25, lw=0.6)
    ax.legend(
        fontsize="small",
        title="where how many starts ended",
        title_fontsize="small",
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        frameon=False,
    )
    return ax


def plot_model_choice(
    choice: xr.Dataset, ax: Axes | None = None, *, criterion: str = "bic"
) -> Axes:
    """Plots an information criterion against the number of components, a line a covariance type.

    Args:
        choice: The criterion over `covariance` and `num_components`; lower is better.
        ax: Where to draw; a new figure if None.
        criterion: The name of the variable, "bic" or "aic".

    Returns:
        The axes; the ring marks the lowest.
    """
    ax = _axes(ax, _WIDE)
    values = choice[criterion].transpose("covariance", "num_components")
    number = values["num_components"].values
    for i, name in enumerate(values["covariance"].values):
        colour, marker = _sign(i)
        ax.plot(
            number,
            values.sel(covariance=name).values,
            ls=_STYLES[i % len(_STYLES)],
            marker=marker,
            color=colour,
            label=str(name),
        )
    row, column = np.unravel_index(np.nanargmin(values.values), values.shape)
    least = float(values.values[row, column])
    ax.plot([number[column]], [least], "o", ms=15, mew=1.8, color=_ORANGE, fillstyle="none")
    spread = float(np.nanmax(values.values[:, 1:]) if len(number) > 1 else least) - least
    ax.set_ylim(least - 0.12 * spread - 1, least + 1.1 * spread + 1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("components K")
    ax.set_ylabel(f"{criterion.upper()}, lower is better")
    ax.set_title(f"Lowest: {values['covariance'].values[row]}, K = {number[column]}")
    ax.grid(alpha=0.25, lw=0.6)
    ax.legend(fontsize="small", title="covariance", title_fontsize="small")
    return ax


def plot_num_components(result: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Plots what chooses the number of components, each by how far it lies below its highest.

    Args:
        result: From `compare_num_components`.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes, a line a criterion; the ring of each is at the number that it chooses. The bound
        without log K! is left out: it is not the evidence of a model.
    """
    ax = _axes(ax, _WIDE)
    number = result["num_components"].values
    shown = [n for n in result.data_vars if n not in ("log_likelihood", "bound")]
    for i, name in enumerate(shown):
        values = result[name].values - np.nanmax(result[name].values)
        colour, marker = _sign(i)
        text = {"bic_evidence": "-BIC / 2", "icl_evidence": "-ICL / 2"}.get(str(name))
        text = text or str(name).replace("_over_labels", " + log K!").replace("_", " ")
        best = int(np.nanargmax(values))
        label = f"{text}: K = {number[best]}"
        line = _STYLES[i % len(_STYLES)]
        ax.plot(number, values, label=label, ls=line, color=colour, marker=marker)
        ax.plot([number[best]], [0.0], "o", ms=14, mew=1.8, color=colour, fillstyle="none")
    ax.set_yscale("symlog", linthresh=1.0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("components K")
    ax.set_ylabel("below its highest, nats")
    ax.grid(alpha=0.25, lw=0.6)
    ax.legend(fontsize="small")
    return ax
