r"""From EM to the VAE on one bound: the same mixture fitted in seven ways, then a neural decoder.

Exact EM, its approximations, gradients, variational inference for each datum and an amortised guide
start at the same mixture and are drawn on the same axes. Then the component becomes continuous and
its Gaussian a network's output: what stays exact, what becomes a bound, what amortisation costs.

    python -m analyses.em_to_vae
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from analyses.command import Output, make_parser
from analyses.em_to_vae.methods import (
    AMORTISED,
    IMPORTANCE,
    METHODS,
    SHORT,
    TINY,
    Row,
    Settings,
    Trained,
    maximize_mixture,
    maximize_vae,
)
from analyses.pages import Rows
from analyses.standardised import DATA, DATA_HELP, Sample, run_on_sample
from pyro_vae import VAE, GaussianMixture, log_evidence
from pyro_vae.diagnostics.gap import elbo_gap
from pyro_vae.inference.log_weights import khat_threshold
from pyro_vae.plots import plot_bounds, plot_decoder, plot_evidence_parts, plot_mixture
from pyro_vae.results import Result, label, make_result, sha256_of
from pyro_vae.text import rows_text

# --- results --------------------------------------------------------------------------------------


def bounds_result(rows_of: Mapping[str, list[Row]], x: Tensor, *, exact: bool, seed: int) -> Result:
    """All rows below each other, with the coordinate `method`."""
    nats = partial(label, measure="real")
    attrs = {
        "bound": nats(bound="lower", description="the ELBO of q"),
        "log_evidence": nats(bound="exact"),
        "gap": nats(bound="exact" if exact else "unbiased", description="KL(q || p(z | x))"),
        "data_passes": label(unit="none", reduction="none", bound="none"),
        "seconds": label(
            unit="seconds", reduction="none", bound="none", description="without measuring"
        ),
    }
    rows = [row for part in rows_of.values() for row in part]
    return make_result(
        {name: ("row", [row[name] for row in rows], attrs[name]) for name in attrs},
        function="maximize_mixture" if exact else "maximize_vae",
        config={"methods": list(rows_of)},
        seed=seed,
        data_sha256=sha256_of(x),
        coords={"method": ("row", [name for name, part in rows_of.items() for _ in part])},
    )


def last_rows(bounds: Result) -> Result:
    """Where each method ended."""
    methods = bounds["method"].values
    return bounds.isel(row=[np.flatnonzero(methods == m)[-1] for m in dict.fromkeys(methods)])


def decompose_gaps(
    trained: Mapping[str, Trained], x: Tensor, settings: Settings, progress: bool
) -> Result:
    """The gap of each VAE: what its family cannot express, and what amortisation lost.

    log p(x) is by quadrature; `importance` is what importance sampling with the guide makes of it.
    """
    found = []
    for end in trained.values():
        model = end.vae.model
        exact = log_evidence(model, None, x, method="quadrature", progress=progress)
        drawn = log_evidence(
            model,
            end.guide,
            x,
            num_particles=settings.evidence_particles,
            seed=settings.seed,
            progress=progress,
        )
        gaps = elbo_gap(
            model,
            end.guide,
            x,
            evidence=exact,
            richer=(),
            max_steps=settings.refit_steps,
            seed=settings.seed,
            progress=progress,
        )
        columns = ("elbo", "gap", "approximation_gap", "amortization_gap")
        quantities = {name.replace("elbo", "bound"): gaps.quantity(name) for name in columns}
        quantities["log_evidence"] = exact.quantity("log_evidence")
        quantities["importance"] = drawn.quantity("log_evidence")
        bad = ~(drawn["khat"].values <= khat_threshold(settings.evidence_particles))
        found.append((quantities, int(bad.sum())))
    variables: dict[str, Any] = {"num_bad_khat": ("method", [bad for _, bad in found], {})}
    for name, quantity in found[0][0].items():
        of_all = [quantities[name] for quantities, _ in found]
        attrs = label(bound=quantity.bound, measure="real")
        variables[name] = ("method", [q.value for q in of_all], attrs)
        variables[f"{name}_se"] = ("method", [q.standard_error or 0.0 for q in of_all], {})
    return make_result(
        variables,
        function="decompose_gaps",
        config={
            "evidence_particles": settings.evidence_particles,
            "refit_steps": settings.refit_steps,
        },
        seed=settings.seed,
        data_sha256=sha256_of(x),
        coords={"method": list(trained)},
    )


# --- figures --------------------------------------------------------------------------------------


def bounds_figure(bounds: Result, best: float | None) -> Figure:
    """The bound against passes and seconds; with `best`, its distance from there as well."""
    shown = (None,) if best is None else (None, best)
    figure = Figure(figsize=(12.0, 4.4 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 2, squeeze=False, sharex="col", sharey="row")
    for line, below in zip(panels, shown, strict=True):
        for ax, across in zip(line, ("data_passes", "seconds"), strict=True):
            named = ax is panels[-1, 0]
            plot_bounds(bounds, ax, against=across, best=below, legend=named, among=METHODS)
            ax.label_outer()
    panels[0, 0].set_title("by passes over the data")
    panels[0, 1].set_title("by time")
    return figure


def parts_figure(mixture: Result, vae: Result) -> Figure:
    """The bar chart of every stage."""
    figure = Figure(figsize=(14.0, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    title = "log p(x) = ELBO + KL"
    plot_evidence_parts(
        mixture, mixture["method"].values.tolist(), left, title=f"mixture: {title}, all exact"
    )
    plot_evidence_parts(
        vae, vae["method"].values.tolist(), right, title=f"VAE: {title}, ELBO by draws"
    )
    return figure


def models_figure(sample: Sample, mixture: GaussianMixture, vae: VAE) -> Figure:
    """The discrete and the continuous mixture side by side."""
    figure = Figure(figsize=(9.4, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    where: dict[str, Any] = {"features": sample.features, "names": sample.names}
    plot_mixture(mixture, sample.x, left, title=f"{len(mixture.locs)} components", **where)
    plot_decoder(vae, sample.x, right, title="a component for every z: the VAE", **where)
    return figure


# --- tables ---------------------------------------------------------------------------------------


def mixture_rows(ends: Result) -> Rows:
    """Where each method on the mixture ended, in nats per datum."""
    return [
        {
            "method": str(row["method"].values),
            "log p(x)": f"{float(row.log_evidence):.6f}",
            "ELBO": f"{float(row.bound):.6f}",
            "gap": f"{float(row.gap):.1e}",
            "data passes": f"{float(row.data_passes):.0f}",
            "seconds": f"{float(row.seconds):.2f}",
        }
        for row in (ends.isel(row=i) for i in range(ends.sizes["row"]))
    ]


def vae_rows(ends: Result) -> Rows:
    """The gap decomposition of each VAE, in nats per datum with Monte-Carlo standard errors."""

    def sure(row: Result, name: str) -> str:
        return f"{float(row[name]):.4f} ± {float(row[name + '_se']):.4f}"

    return [
        {
            "method": str(row["method"].values),
            "log p(x)": f"{float(row.log_evidence):.4f}",
            "by importance": sure(row, "importance"),
            "bad k-hat": str(int(row.num_bad_khat)),
            "ELBO": sure(row, "bound"),
            "gap": sure(row, "gap"),
            "approximation": sure(row, "approximation_gap"),
            "amortisation": sure(row, "amortization_gap"),
        }
        for row in (ends.isel(method=i) for i in range(ends.sizes["method"]))
    ]


# --- the whole ------------------------------------------------------------------------------------


def run(sample: Sample, settings: Settings, out: Output) -> Path:
    """Trains, measures, saves and draws everything; returns the page's path."""
    with out.timed(f"{sample.name}: one mixture, seven methods"):
        rows_of, exact = maximize_mixture(sample, settings, out)
    bounds = bounds_result(rows_of, sample.x, exact=True, seed=settings.seed)
    with out.timed("the VAE"):
        trained = maximize_vae(sample, settings, out)
    vae_rows_of = {name: end.rows for name, end in trained.items()}
    vae_bounds = bounds_result(vae_rows_of, sample.x, exact=False, seed=settings.seed)
    with out.timed("the gaps"):
        vae_ends = decompose_gaps(trained, sample.x, settings, out.progress)
    out.save({"bounds": bounds, "vae_bounds": vae_bounds, "vae_ends": vae_ends})
    ends = last_rows(bounds)
    tables = {"mixture_rows": mixture_rows(ends), "vae_rows": vae_rows(vae_ends)}
    for rows in tables.values():
        out.say(f"\n{rows_text(rows)}")
    best = float(ends["log_evidence"].max())
    places = {str(name): i for i, name in enumerate(ends["method"].values)}
    return out.write_page(
        aloud=False,
        sample=sample,
        settings=settings,
        made=bounds.provenance,
        k=sample.num_components,
        best=best,
        spread=best - float(ends["log_evidence"].min()),
        reached=float(vae_ends["log_evidence"].max()),
        at={short: ends.isel(row=places[name]) for short, name in SHORT.items()},
        amortised=vae_ends.sel({"method": AMORTISED}),  # xarray has a keyword of that name
        covering=vae_ends.sel({"method": IMPORTANCE}),
        bounds=bounds_figure(bounds, best),
        models=models_figure(sample, exact, trained[AMORTISED].vae),
        vae_bounds=bounds_figure(vae_bounds, None),
        parts=parts_figure(ends, vae_ends),
        **tables,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis from the command line."""
    given = make_parser(
        "em_to_vae",
        "Fits the same Gaussian mixture to the same data in seven ways, from exact EM to an\n"
        "amortised guide, and draws their bounds on the same axes; then replaces the components\n"
        "by a neural decoder, which makes it a VAE, and shows what stays exact.",
        data=DATA,
        data_help=DATA_HELP,
        epilog="It writes report.html (read this one), the figures as PNG, and the numbers as\n"
        "NetCDF: bounds.nc, vae_bounds.nc, vae_ends.nc; pyro_vae.results.load_result reads them.",
    ).parse_args(arguments)
    settings = replace(TINY if given.tiny else Settings(), seed=given.seed)
    return run_on_sample(partial(run, settings=settings), given)
