r"""EM on a Gaussian mixture: the fit, its staircase, its local optima, and how many components.

Old Faithful (or iris) is standardised and fitted by EM from a poor start on purpose. Then: what
each half step does to the bound, what other starts reach, what BIC chooses, and whether
scikit-learn agrees.

    python -m analyses.em_gmm
"""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as SklearnMixture

from analyses.command import Output, make_parser
from analyses.pages import Rows, figure_of
from analyses.standardised import DATA, DATA_HELP, Sample, run_on_sample
from pyro_vae import GaussianMixture, fit_em
from pyro_vae.inference.em import EMFit
from pyro_vae.models.mixtures import COVARIANCES
from pyro_vae.plots import (
    plot_evidence_parts,
    plot_half_steps,
    plot_mixture,
    plot_model_choice,
    plot_restarts,
)
from pyro_vae.results import Result, label, make_result, sha256_of
from pyro_vae.text import rows_text


@dataclass(frozen=True)
class Settings:
    """How much is done; the defaults take well under a minute.

    Attributes:
        snapshots: Iterations after which the fit is shown.
        max_iterations: Of the fit that is shown, at most.
        num_starts: Random starts whose paths are shown.
        start_iterations: Iterations of each of them.
        max_components: Mixtures of up to so many components are compared.
        num_restarts: Starts of each mixture that is compared.
        agreement_iterations: Iterations of ours and of scikit-learn's.
        reg_covar: Added to variances where many starts are made, in squared standard deviations
            of the data, so that no component shrinks onto tied data.
        seed: Seeds everything.
    """

    snapshots: tuple[int, ...] = (1, 2, 5, 20)
    max_iterations: int = 500
    num_starts: int = 30
    start_iterations: int = 400
    max_components: int = 7
    num_restarts: int = 10
    agreement_iterations: int = 20
    reg_covar: float = 1e-3
    seed: int = 0


TINY = Settings(
    snapshots=(1, 2),
    max_iterations=20,
    num_starts=3,
    start_iterations=5,
    max_components=2,
    num_restarts=1,
    agreement_iterations=3,
)


# --- the measurements -----------------------------------------------------------------------------


def poor_start(sample: Sample) -> GaussianMixture:
    """Round components of half the data's spread, where there are no data: far from any fit."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randperm(len(sample.x), generator=generator)[: sample.num_components]
    dim, k = sample.x.shape[1], sample.num_components
    weights = torch.full((k,), 1 / k, dtype=torch.float64)
    # Data with features exchanged and every second one mirrored.
    locs = sample.x[rows].flip(1) * torch.tensor([1.0, -1.0]).repeat(dim)[:dim]
    return GaussianMixture.from_parameters(
        weights, locs, 0.25 * torch.eye(dim, dtype=torch.float64).repeat(k, 1, 1)
    )


def fit_from_poor_start(sample: Sample, iterations: int, progress: bool) -> EMFit:
    """EM in float64 until the bound rises by less than 1e-10, or so many iterations."""
    return fit_em(
        poor_start(sample),
        sample.x,
        initialization="given",
        max_iterations=iterations,
        tolerance=1e-10,
        progress=progress,
    ).require_finished()


def follow_starts(sample: Sample, settings: Settings, progress: bool) -> tuple[Result, list[EMFit]]:
    """Many random starts of one mixture with more components than the data show."""
    fits = [
        fit_em(
            GaussianMixture(
                sample.crowded, sample.x.shape[1], reg_covar=settings.reg_covar
            ).double(),
            sample.x,
            initialization="random",
            max_iterations=settings.start_iterations,
            tolerance=0.0,
            seed=settings.seed + start,
            on_singular="restart",
            progress=progress,
        ).require_finished()
        for start in range(settings.num_starts)
    ]
    histories = [f.history.isel(step=f.history["phase"].values == "E") for f in fits]
    paths = np.stack([h["log_evidence"].values for h in histories])
    attrs = label(bound="exact", measure="real", description="log p(x) after each iteration")
    result = make_result(
        {"log_evidence": (("start", "iteration"), paths, attrs)},
        function="follow_starts",
        config={"num_components": sample.crowded, "reg_covar": settings.reg_covar},
        seed=settings.seed,
        data_sha256=sha256_of(sample.x),
        coords={
            "start": np.arange(settings.num_starts),
            "iteration": np.arange(settings.start_iterations + 1),
        },
    )
    return result, fits


def choose_model(sample: Sample, settings: Settings, out: Output) -> Result:
    """BIC and AIC of every covariance type and number of components."""
    numbers = range(1, settings.max_components + 1)
    columns: dict[str, list[list[float]]] = {n: [] for n in ("bic", "aic", "log_evidence_total")}
    for covariance in COVARIANCES:
        found = [_fit_one(sample, covariance, number, settings, out.progress) for number in numbers]
        out.say(f"  {covariance}: BIC {', '.join(f'{m.bic(sample.x):.0f}' for m in found)}")
        columns["bic"].append([m.bic(sample.x) for m in found])
        columns["aic"].append([m.aic(sample.x) for m in found])
        columns["log_evidence_total"].append(
            [float(m.score_samples(sample.x).sum()) for m in found]
        )
    of_criterion = partial(label, reduction="total", bound="none", measure="real")
    attrs = {
        "bic": of_criterion(description="-2 log p(x) + log N parameters; lower is better"),
        "aic": of_criterion(description="-2 log p(x) + 2 parameters; lower is better"),
        "log_evidence_total": label(reduction="total", bound="exact", measure="real"),
    }
    dims = ("covariance", "num_components")
    return make_result(
        {name: (dims, values, attrs[name]) for name, values in columns.items()},
        function="choose_model",
        config={"num_restarts": settings.num_restarts, "reg_covar": settings.reg_covar},
        seed=settings.seed,
        data_sha256=sha256_of(sample.x),
        coords={"covariance": list(COVARIANCES), "num_components": list(numbers)},
    )


def _fit_one(
    sample: Sample, covariance: str, number: int, settings: Settings, progress: bool
) -> GaussianMixture:
    mixture = GaussianMixture(
        number, sample.x.shape[1], covariance, reg_covar=settings.reg_covar
    ).double()
    fit_em(
        mixture,
        sample.x,
        num_restarts=settings.num_restarts,
        tolerance=1e-6,
        on_singular="restart",
        seed=settings.seed,
        progress=progress,
    ).require_finished()
    return mixture


def compare_with_sklearn(sample: Sample, settings: Settings) -> Result:
    """Total log p(x) of ours and of scikit-learn's after equal iterations from equal starts."""
    ours, theirs = [], []
    for covariance in COVARIANCES:
        mixture = GaussianMixture(sample.num_components, sample.x.shape[1], covariance).double()
        mixture.initialize(sample.x, seed=settings.seed)
        start = {name: v.detach().numpy().copy() for name, v in mixture.fitted_values().items()}
        matrices = covariance in ("full", "tied")
        peer = SklearnMixture(
            sample.num_components,
            covariance_type=covariance,
            tol=0.0,
            reg_covar=0.0,
            max_iter=settings.agreement_iterations,
            weights_init=start["weights"],
            means_init=start["locs"],
            precisions_init=np.linalg.inv(start["covariances"])
            if matrices
            else 1 / start["covariances"],
            random_state=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # tol=0 never converges
            peer.fit(sample.x.numpy())
        theirs.append(float(peer.score_samples(sample.x.numpy()).sum()))
        history = (
            fit_em(
                mixture,
                sample.x,
                initialization="given",
                max_iterations=settings.agreement_iterations,
                tolerance=0.0,
            )
            .require_finished()
            .history
        )
        ours.append(float(history["log_evidence_total"][-1]))
    attrs = label(reduction="total", bound="exact", measure="real")
    return make_result(
        {"ours": ("covariance", ours, attrs), "scikit_learn": ("covariance", theirs, attrs)},
        function="compare_with_sklearn",
        config={"iterations": settings.agreement_iterations},
        seed=settings.seed,
        data_sha256=sha256_of(sample.x),
        coords={"covariance": list(COVARIANCES)},
    )


# --- figures --------------------------------------------------------------------------------------


def snapshots_figure(sample: Sample, settings: Settings) -> Figure:
    """The start, the first E step, and the fit after chosen iterations."""
    shown: list[tuple[str, GaussianMixture, bool]] = [
        ("the start", poor_start(sample), False),
        ("after the first E step", poor_start(sample), True),
    ]
    for iterations in settings.snapshots:
        mixture = poor_start(sample)
        fit_em(
            mixture, sample.x, initialization="given", max_iterations=iterations, tolerance=0.0
        ).require_finished()
        plural = "s" * (iterations != 1)
        shown.append((f"after {iterations} iteration{plural}", mixture, True))
    columns = 3
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.0 * columns, 4.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for ax, (title, mixture, coloured) in zip(panels, shown, strict=False):
        plot_mixture(
            mixture,
            sample.x,
            ax,
            features=sample.features,
            names=sample.names,
            responsibilities=coloured,
            title=f"{title}\nlog p(x) {mixture.score(sample.x):.4f}",
        )
        ax.label_outer()
    for ax in panels[len(shown) :]:
        ax.set_visible(False)
    return figure


def staircase_figure(history: xr.Dataset) -> Figure:
    """The staircase, and the parts of log p(x) in its first half steps."""
    figure = Figure(figsize=(13.0, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    plot_half_steps(history, left, first=FIRST_SHOWN)
    shown = history.isel(step=slice(FIRST_SHOWN, FIRST_SHOWN + 7))
    names = [
        f"{phase} step {n}"
        for phase, n in zip(shown["phase"].values, shown["iteration"].values, strict=True)
    ]
    plot_evidence_parts(shown, names, right, title="log p(x) = ELBO + KL, half step by half step")
    return figure


def optima_figure(sample: Sample, restarts: Result, fits: Sequence[EMFit]) -> Figure:
    """The paths of all starts, and where the best and the worst of them ended."""
    figure = Figure(figsize=(15.0, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    plot_restarts(restarts, left, title=f"{len(fits)} random starts, K = {sample.crowded}")
    ends = restarts["log_evidence"].values[:, -1]
    for ax, which, name in (
        (middle, int(ends.argmax()), "best"),
        (right, int(ends.argmin()), "worst"),
    ):
        mixture = fits[which].model.__self__
        plot_mixture(
            mixture,
            sample.x,
            ax,
            features=sample.features,
            names=sample.names,
            title=f"the {name} end: {ends[which]:.4f}",
        )
    return figure


# --- tables ---------------------------------------------------------------------------------------


def component_rows(mixture: GaussianMixture) -> Rows:
    """Weight, mean and standard deviations of each component, in standard units."""
    deviations = mixture.dense_covariances.diagonal(dim1=1, dim2=2).sqrt()
    columns = (mixture.weights.tolist(), mixture.locs.tolist(), deviations.tolist())
    return [
        {
            "component": str(k + 1),
            "weight": f"{weight:.4f}",
            "mean": ", ".join(f"{v:.3f}" for v in loc),
            "standard deviations": ", ".join(f"{v:.3f}" for v in deviation),
        }
        for k, (weight, loc, deviation) in enumerate(zip(*columns, strict=True))
    ]


def agreement_rows(agreement: Result) -> Rows:
    """Both totals of each covariance type, and their difference."""
    columns = (agreement[name].values for name in ("covariance", "ours", "scikit_learn"))
    return [
        {
            "covariance": str(name),
            "ours, nats": f"{ours:.8f}",
            "scikit-learn, nats": f"{theirs:.8f}",
            "difference": f"{ours - theirs:+.1e}",
        }
        for name, ours, theirs in zip(*columns, strict=True)
    ]


def choice_rows(choice: Result, count: int = 5) -> Rows:
    """The models of the lowest BIC, lowest first."""
    bic = choice["bic"].values
    rows = []
    for place in np.argsort(bic, axis=None)[:count]:
        i, j = np.unravel_index(place, bic.shape)
        rows.append(
            {
                "covariance": str(choice["covariance"].values[i]),
                "K": str(choice["num_components"].values[j]),
                "BIC": f"{bic[i, j]:.1f}",
                "above the lowest": f"{bic[i, j] - bic.min():.1f}",
                "log p(x), total": f"{choice['log_evidence_total'].values[i, j]:.2f}",
            }
        )
    return rows


# --- the whole ------------------------------------------------------------------------------------

FIRST_SHOWN = 2  # the half step where the staircase begins: the first iteration dwarfs the others


def run(sample: Sample, settings: Settings, out: Output) -> Path:
    """Fits, measures, saves and draws everything; returns the page's path."""
    fitted = fit_from_poor_start(sample, settings.max_iterations, out.progress)
    history = fitted.history
    with out.timed(f"{settings.num_starts} starts"):
        restarts, fits = follow_starts(sample, settings, out.progress)
    out.say("choosing the number of components")
    choice = choose_model(sample, settings, out)
    agreement = compare_with_sklearn(sample, settings)
    out.save({"history": history, "restarts": restarts, "choice": choice, "agreement": agreement})
    out.say(f"\n{sample.name}, K = {sample.num_components}: {fitted.summary()}")
    choices, agreements = choice_rows(choice), agreement_rows(agreement)
    out.say(f"\nlowest BIC:\n{rows_text(choices)}")
    out.say(f"\nagreement with scikit-learn, total log p(x):\n{rows_text(agreements)}")
    paths = restarts["log_evidence"].values
    return out.write_page(
        aloud=False,
        sample=sample,
        settings=settings,
        made=choice.provenance,
        history=history,
        last=history.isel(step=-1),
        last_opening=history["gap"].values[history["phase"].values == "M"][-1],
        converged=fitted.converged,
        ends=paths[:, -1],
        fall=max(-float(np.diff(paths, axis=1).min()), 0.0),
        agreement=agreement,
        components=component_rows(fitted.model.__self__),
        choices=choices,
        agreements=agreements,
        fit=snapshots_figure(sample, settings),
        staircase=staircase_figure(history),
        optima=optima_figure(sample, restarts, fits),
        choice=figure_of(plot_model_choice(choice)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis from the command line."""
    given = make_parser(
        "em_gmm",
        "Fits a Gaussian mixture by EM and shows every half step of it: the fit, the staircase\n"
        "of E and M steps under log p(x), where other starts end, the number of components by\n"
        "BIC, and agreement with scikit-learn.",
        data=DATA,
        data_help=DATA_HELP,
        epilog="It writes report.html (read this one), the figures as PNG, and the numbers as\n"
        "NetCDF: history.nc, restarts.nc, choice.nc and agreement.nc, which\n"
        "pyro_vae.results.load_result reads.",
    ).parse_args(arguments)
    settings = replace(TINY if given.tiny else Settings(), seed=given.seed)
    return run_on_sample(partial(run, settings=settings), given)


if __name__ == "__main__":
    sys.exit(main())
