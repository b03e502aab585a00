r"""EM on a Gaussian mixture: the fit, its staircase, its local optima, and how many components.

Old Faithful (or iris) is standardised and fitted by EM from a poor start on purpose. Then: what
each half step does to the bound, what other starts reach, what BIC chooses, and whether
scikit-learn agrees.

    python -m analyses.em_gmm
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import Tensor

from analyses.command import make_parser, out_folder, run_on_one_thread
from analyses.sections import COMMAND_NOTE, save_figures
from pyro_vae import GaussianMixture, fit_em, load_dataset
from pyro_vae.app.pages import (
    Formula,
    Heading,
    Note,
    Page,
    Paragraph,
    Part,
    Picture,
    Table,
    Verbatim,
)
from pyro_vae.data import DatasetError
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


@dataclass(frozen=True)
class Sample:
    """Standardised data, and how to show them.

    Attributes:
        name: What they are called.
        x: Shape (batch, features), float64, with mean 0 and variance 1.
        names: Of the features.
        features: The two that are shown.
        num_components: Of the mixture that is shown.
        start: How the mixture of the second analysis is started, see `GaussianMixture.initialize`.
        crowded: Components of the mixture whose local optima are shown.
    """

    name: str
    x: Tensor
    names: tuple[str, ...]
    features: tuple[int, int]
    num_components: int
    start: str
    crowded: int


def load(name: str, root: str | None, say: Callable[[str], None]) -> Sample:
    """The data by name, standardised; iris where the file of Old Faithful is not there."""
    if name == "faithful":
        try:
            x = load_dataset("faithful", root).train
        except DatasetError:
            say(
                "Old Faithful is not in the data folder, so this is iris, which comes with "
                "scikit-learn (pyro-vae data --help says how to get the file)."
            )
        else:
            clock = ("eruption time (standardised)", "time to the next (standardised)")
            return Sample("Old Faithful", _standardised(x), clock, (0, 1), 2, "random", 4)
    iris = load_dataset("iris")
    x = torch.cat([iris.train, iris.test])
    parts = ("sepal length", "sepal width", "petal length", "petal width")
    names = tuple(f"{part} (standardised)" for part in parts)
    return Sample("iris", _standardised(x), names, (1, 2), 3, "k-means++", 4)


def place(given: argparse.Namespace, sample: Sample, say: Callable[[str], None]) -> Path:
    """Where files go: those of data that stand in for others do not replace the others'."""
    used = sample.name if sample.name in DATA else given.data
    out = out_folder(given, used)
    if used != given.data:
        say(f"Its files go to {out}; results of Old Faithful stay as they are.")
    return out


def _standardised(x: Tensor) -> Tensor:
    x = x.double()
    return (x - x.mean(0)) / x.std(0, correction=0)


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


def choose_model(
    sample: Sample, settings: Settings, say: Callable[[str], None], progress: bool
) -> Result:
    """BIC and AIC of every covariance type and number of components."""
    numbers = range(1, settings.max_components + 1)
    columns: dict[str, list[list[float]]] = {n: [] for n in ("bic", "aic", "log_evidence_total")}
    for covariance in COVARIANCES:
        found = [_fit_one(sample, covariance, number, settings, progress) for number in numbers]
        say(f"  {covariance}: BIC {', '.join(f'{m.bic(sample.x):.0f}' for m in found)}")
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


# --- page -----------------------------------------------------------------------------------------


def parameter_rows(mixture: GaussianMixture) -> list[list[str]]:
    """Weight, mean and standard deviations of each component, in standard units."""
    deviations = mixture.dense_covariances.diagonal(dim1=1, dim2=2).sqrt()
    return [
        [
            str(k + 1),
            f"{weight:.4f}",
            ", ".join(f"{v:.3f}" for v in loc.tolist()),
            ", ".join(f"{v:.3f}" for v in deviation.tolist()),
        ]
        for k, (weight, loc, deviation) in enumerate(
            zip(mixture.weights.tolist(), mixture.locs, deviations, strict=True)
        )
    ]


def agreement_rows(agreement: Result) -> list[list[str]]:
    """Both totals of each covariance type, and their difference."""
    return [
        [str(name), f"{ours:.8f}", f"{theirs:.8f}", f"{ours - theirs:+.1e}"]
        for name, ours, theirs in zip(
            agreement["covariance"].values,
            agreement["ours"].values,
            agreement["scikit_learn"].values,
            strict=True,
        )
    ]


def choice_rows(choice: Result, count: int = 5) -> list[list[str]]:
    """The models of the lowest BIC, lowest first."""
    bic = choice["bic"].values
    order = np.argsort(bic, axis=None)[:count]
    rows = []
    for place in order:
        i, j = np.unravel_index(place, bic.shape)
        rows.append(
            [
                str(choice["covariance"].values[i]),
                str(choice["num_components"].values[j]),
                f"{bic[i, j]:.1f}",
                f"{bic[i, j] - bic.min():.1f}",
                f"{choice['log_evidence_total'].values[i, j]:.2f}",
            ]
        )
    return rows


FIRST_SHOWN = 2  # the half step where the staircase begins: the first iteration dwarfs the others
AGREEMENT = ("covariance", "ours, nats", "scikit-learn, nats", "difference")
CHOICE = ("covariance", "K", "BIC", "above the lowest", "log p(x), total")


def page_parts(
    sample: Sample,
    settings: Settings,
    fitted: EMFit,
    restarts: Result,
    choice: Result,
    agreement: Result,
    figures: Mapping[str, Figure],
) -> list[Part]:
    """The page from top to bottom."""
    history = fitted.history
    last = history.isel(step=-1)
    m_steps = history.isel(step=history["phase"].values == "M")
    ends = restarts["log_evidence"].values[:, -1]
    fall = max(-float(np.diff(restarts["log_evidence"].values, axis=1).min()), 0.0)
    near = int((ends.max() - ends < 1e-3).sum())
    best, second = choice_rows(choice, 2)
    apart = float(np.abs(agreement["ours"].values - agreement["scikit_learn"].values).max())
    return [
        Paragraph(
            f"{sample.name}: {len(sample.x)} data of {sample.x.shape[1]} features, each shifted "
            "and scaled to mean 0 and variance 1. All log densities are of these standardised "
            "data, in nats, and computed in double precision."
        ),
        Heading("The model"),
        Paragraph(
            "Each datum first draws a component z, which nobody sees, and then itself from the "
            "Gaussian of that component. What we see has the density of the sum over components:"
        ),
        Formula(r"p(x) = \sum_{k=1}^{K} \pi_k \, \mathcal{N}(x \mid \mu_k, \Sigma_k)"),
        Paragraph(
            "If we knew the components, we would estimate each mean and covariance from its own "
            "data. If we knew the parameters, Bayes' rule would tell how responsible each "
            "component is for each datum. EM does the one, then the other, and again. The E step "
            "computes the responsibilities:"
        ),
        Formula(
            r"r_{nk} = p(z_n = k \mid x_n) = \dfrac{\pi_k \, \mathcal{N}(x_n \mid \mu_k, \Sigma_k)}"
            r"{\sum_j \pi_j \, \mathcal{N}(x_n \mid \mu_j, \Sigma_j)}"
        ),
        Paragraph("The M step takes weighted counts, means and covariances:"),
        Formula(
            r"N_k = \sum_n r_{nk}, \quad \pi_k = \dfrac{N_k}{N}, \quad "
            r"\mu_k = \dfrac{1}{N_k} \sum_n r_{nk} x_n, \quad "
            r"\Sigma_k = \dfrac{1}{N_k} \sum_n r_{nk} (x_n - \mu_k)(x_n - \mu_k)^\top"
        ),
        Heading("The fit, iteration by iteration"),
        Paragraph(
            "The start is poor on purpose. A datum has the colour of its component, and a mixed "
            "colour where the responsibilities are divided; the ellipses lie one and two standard "
            "deviations from the means. log p(x) is a mean over the data."
        ),
        Picture(figures["fit"], "EM from a poor start (after Bishop 2006)."),
        Table(
            ("component", "weight", "mean", "standard deviations"),
            parameter_rows(fitted.model.__self__),
        ),
        Paragraph(
            f"After {int(last.iteration)} iterations an iteration gains less than 1e-10 nats per "
            f"datum{'' if fitted.converged else ' (no: the iterations ran out)'}; the total "
            f"log-likelihood is {float(last.log_evidence_total):.4f}."
        ),
        Heading("Why it works: one bound, moved from two sides"),
        Paragraph(
            "Take any distribution q over the components of each datum. Then log p(x) splits into "
            "a bound, the ELBO, and a remainder that is never negative:"
        ),
        Formula(
            r"\log p(x) = \mathrm{E}_q[\log p(x, z) - \log q(z)] + "
            r"\mathrm{KL}(q(z) \,\|\, p(z \mid x))"
        ),
        Paragraph(
            "The E step leaves the model alone and sets q to the responsibilities: the KL becomes "
            "0 and the ELBO touches log p(x). The M step leaves q alone and raises the ELBO; log "
            "p(x) must rise by at least as much, and because q is now the posterior of an older "
            "model, the KL opens again. So log p(x) can never fall. The left picture shows the "
            "staircase, the right one the same numbers as bars, both from the end of "
            "the first iteration."
        ),
        Picture(figures["staircase"], "Half steps of EM: E steps close the gap, M steps open it."),
        Paragraph(
            f"Here the first M step raises the bound by "
            f"{float(history.bound[1] - history.bound[0]):.4f} nats per datum and opens a KL of "
            f"{float(history.gap[1]):.4f}; the last opens {float(m_steps.gap[-1]):.1e}. Over all "
            f"half steps the largest error of log p(x) = ELBO + KL is "
            f"{float(np.abs(history.log_evidence - history.bound - history.gap).max()):.1e} nats "
            "per datum: each of the three is summed by itself."
        ),
        Heading("Restarts and local optima"),
        Paragraph(
            "EM finds a local maximum. With as many components as the data show, most starts find "
            f"the same one. With {sample.crowded} components they do not: {len(ends)} random "
            f"starts ended between {ends.min():.4f} and {ends.max():.4f} nats per datum, and "
            f"{near} of them within 0.001 of the best. "
            f"The most that log p(x) fell in one iteration of any of them is {fall:.0e} (not "
            "exactly 0, because the floor under the variances, see below, makes the M step "
            "inexact). That the likelihood rises does not say towards which maximum. Hence "
            "num_restarts in fit_em, which keeps the best."
        ),
        Picture(figures["optima"], "Left: paths of all starts. Right: two ends."),
        Heading("How many components?"),
        Paragraph(
            "log p(x) of the data that were fitted rises with every parameter, so it cannot "
            "choose. The Bayesian information criterion charges log(N)/2 nats for each (the "
            "formula is twice that, with the sign turned, so lower is better):"
        ),
        Formula(r"\mathrm{BIC} = -2 \log p(x) + (\mathrm{number\ of\ parameters}) \log N"),
        Picture(figures["choice"], "The ring marks the lowest BIC."),
        Table(CHOICE, choice_rows(choice)),
        Paragraph(
            f"BIC chooses {best[0]} covariances with K = {best[1]}; next comes {second[0]} with K "
            f"= {second[1]}, {second[3]} above. A difference below 2 says next to nothing, one "
            "above 10 says much (Kass and Raftery 1995)."
        ),
        Note(
            "BIC supposes that the maximum was found and that no component sits on a handful of "
            f"data. Here {settings.num_restarts} starts and a floor under the variances "
            f"({settings.reg_covar:g} squared standard deviations of the data) see to it. The "
            "likelihood of a mixture without such a floor has no maximum: it grows without end as "
            "a component shrinks onto one datum."
        ),
        Heading("Does scikit-learn agree?"),
        Paragraph(
            f"Both make {settings.agreement_iterations} iterations from the same start, without a "
            f"floor under the variances. The largest difference of log p(x) is {apart:.1e} nats, "
            "over all data."
        ),
        Table(AGREEMENT, agreement_rows(agreement)),
    ]


def say_numbers(
    sample: Sample,
    fitted: EMFit,
    restarts: Result,
    choice: Result,
    agreement: Result,
    say: Callable[[str], None],
) -> None:
    """The numbers of the page as plain text."""
    say(f"\n{sample.name}, K = {sample.num_components}: {fitted.summary()}")
    say(f"total log p(x) {float(fitted.history.log_evidence_total[-1]):.4f} nats")
    ends = restarts["log_evidence"].values[:, -1]
    say(f"{len(ends)} starts, K = {sample.crowded}: from {ends.min():.4f} to {ends.max():.4f}")
    say("lowest BIC:")
    for row in choice_rows(choice, 3):
        say(f"  {row[0]}, K = {row[1]}: {row[2]}")
    say("agreement with scikit-learn, total log p(x):")
    for row in agreement_rows(agreement):
        say(f"  {row[0]}: ours {row[1]}, difference {row[3]}")


def how_it_was_made(result: Result, settings: object, command: str) -> list[Part]:
    """The end of a page."""
    made = result.provenance
    return [
        Heading("How it was made"),
        Paragraph(
            f"pyro_vae {made['version']}, torch {made['torch']}, {made['created']}, one thread; "
            f"{settings}."
        ),
        Paragraph(COMMAND_NOTE),
        Verbatim(command),
    ]


# --- the whole ------------------------------------------------------------------------------------


def run(
    sample: Sample, out: Path, settings: Settings, say: Callable[[str], None], progress: bool
) -> Path:
    """Fits, measures, saves and draws everything; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    fitted = fit_from_poor_start(sample, settings.max_iterations, progress)
    say(f"following {settings.num_starts} starts")
    started = time.perf_counter()
    restarts, fits = follow_starts(sample, settings, progress)
    say(f"  {time.perf_counter() - started:.0f} s; now choosing the number of components")
    choice = choose_model(sample, settings, say, progress)
    agreement = compare_with_sklearn(sample, settings)
    results = {
        "history": fitted.history,
        "restarts": restarts,
        "choice": choice,
        "agreement": agreement,
    }
    for name, result in results.items():
        result.save(out / f"{name}.nc")
    chosen = plot_model_choice(choice).figure
    assert isinstance(chosen, Figure)
    figures = {
        "fit": snapshots_figure(sample, settings),
        "staircase": staircase_figure(fitted.history),
        "optima": optima_figure(sample, restarts, fits),
        "choice": chosen,
    }
    save_figures(out, figures)
    say_numbers(sample, fitted, restarts, choice, agreement, say)
    page = Page(f"EM on a Gaussian mixture: {sample.name}")
    page.add(*page_parts(sample, settings, fitted, restarts, choice, agreement, figures))
    page.add(*how_it_was_made(choice, settings, "python -m analyses.em_gmm"))
    return page.save(out / "report.html")


DATA = ("faithful", "iris")
DATA_HELP = "Old Faithful is read from the data folder (iris instead if it is not there)"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(
        "em_gmm",
        "Fits a Gaussian mixture by EM and shows every half step of it: the fit, the staircase\n"
        "of E and M steps under log p(x), where other starts end, the number of components by\n"
        "BIC, and agreement with scikit-learn.",
        data=DATA,
        data_help=DATA_HELP,
        epilog="It writes report.html (read this one), the figures as PNG, and the numbers as\n"
        "NetCDF: history.nc, restarts.nc, choice.nc and agreement.nc, which\n"
        "pyro_vae.results.load_result reads.",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis from the command line."""
    given = parse(arguments)
    settings = replace(TINY if given.tiny else Settings(), seed=given.seed)
    say = partial(print, flush=True)
    sample = load(given.data, given.root, say)

    def analysis(out: Path) -> Path:
        return run(sample, out, settings, say, not given.no_progress)

    return run_on_one_thread(analysis, place(given, sample, say))


if __name__ == "__main__":
    sys.exit(main())
