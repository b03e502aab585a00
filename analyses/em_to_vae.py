r"""From EM to the VAE on one bound: the same mixture fitted in seven ways, then a neural decoder.

Exact EM, its approximations, gradients, variational inference for each datum and an amortised guide
start at the same mixture and are drawn on the same axes. Then the component becomes continuous and
its Gaussian a network's output: what stays exact, what becomes a bound, what amortisation costs.

    python -m analyses.em_to_vae
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn

from analyses.command import make_parser, run_on_one_thread
from analyses.em_gmm import DATA, DATA_HELP, Sample, how_it_was_made, load, place
from analyses.sections import as_text, save_figures
from pyro_vae import VAE, GaussianMixture, fit, fit_em, log_evidence
from pyro_vae.app.pages import Formula, Heading, Note, Page, Paragraph, Part, Picture, Table
from pyro_vae.diagnostics.gap import elbo_gap
from pyro_vae.inference.estimators import make_estimator
from pyro_vae.inference.log_weights import khat_threshold
from pyro_vae.inference.programs import Program
from pyro_vae.plots import plot_bounds, plot_decoder, plot_evidence_parts, plot_mixture
from pyro_vae.results import Result, label, make_result, sha256_of

Row = dict[str, float]

EXACT, GENERALISED, SAMPLED, ONLINE = "exact EM", "generalised EM", "Monte-Carlo EM", "online EM"
ENUMERATED, PER_DATUM, AMORTISED = "enumerated gradient", "per-datum variational", "amortised SVI"
IMPORTANCE = "importance bound, amortised"
METHODS = (EXACT, GENERALISED, SAMPLED, ONLINE, ENUMERATED, PER_DATUM, AMORTISED, IMPORTANCE)


@dataclass(frozen=True)
class Settings:
    """How much is done; the defaults take about a minute.

    Attributes:
        iterations: Of exact, generalised and Monte-Carlo EM; passes of online EM.
        epochs: When methods trained by `fit` are measured; the last is where they end.
        learning_rate: Of Adam for the mixture with all data at once.
        batch_learning_rate: Of Adam for the mixture with mini-batches.
        num_samples: Draws for each datum in a Monte-Carlo E step.
        batch_size: Mini-batches of online EM and of amortised guides.
        hidden: Hidden units of encoder and decoder.
        vae_epochs: As `epochs`, for the VAE.
        vae_learning_rate: Of Adam for the VAE with all data at once.
        vae_batch_learning_rate: Of Adam for the VAE with mini-batches.
        vae_particles: Of the VAE's ELBO.
        importance_particles: Of the importance bound that is maximised.
        path_particles: Of the evidence along the way.
        evidence_particles: Of the final evidence.
        refit_steps: In which q is refitted to a datum, at most.
        seed: Seeds everything.
    """

    iterations: int = 60
    epochs: tuple[int, ...] = (1, 2, 3, 5, 8, 13, 20, 30, 50, 80, 130, 200, 300, 500)
    learning_rate: float = 0.05
    batch_learning_rate: float = 0.01
    num_samples: int = 10
    batch_size: int = 64
    hidden: tuple[int, ...] = (16,)
    vae_epochs: tuple[int, ...] = (1, 3, 6, 10, 20, 40, 80, 150, 300, 600, 1000)
    vae_learning_rate: float = 0.03
    vae_batch_learning_rate: float = 5e-3
    vae_particles: int = 4
    importance_particles: int = 5
    path_particles: int = 500
    evidence_particles: int = 5000
    refit_steps: int = 1000
    seed: int = 0


TINY = Settings(
    iterations=2,
    epochs=(1, 2),
    vae_epochs=(1, 2),
    importance_particles=3,
    path_particles=10,
    evidence_particles=20,
    refit_steps=3,
)


# --- guides that know each datum ------------------------------------------------------------------


class PerDatumComponents(nn.Module):
    """A distribution over the components for each datum, with parameters of its own."""

    def __init__(self, num_data: int, num_components: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_data, num_components, dtype=torch.float64))

    def guide(self, x: Tensor) -> None:
        """As many logits as responsibilities."""
        logits = pyro.param("logits", self.logits)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})


class PerDatumNormals(nn.Module):
    """A normal over the latents of each datum, with parameters of its own."""

    def __init__(self, num_data: int, latent_dim: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(num_data, latent_dim, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros(num_data, latent_dim, dtype=torch.float64))

    def guide(self, x: Tensor) -> None:
        """A location and a scale for each datum and latent."""
        loc, scale = pyro.param("loc", self.loc), pyro.param("log_scale", self.log_scale).exp()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


# --- maximising -----------------------------------------------------------------------------------


def maximize_by_em(mixture: GaussianMixture, x: Tensor, method: str, **options: Any) -> list[Row]:
    """A row for each E step of a relative of EM."""
    history = (
        fit_em(mixture, x, method=method, initialization="given", tolerance=0.0, **options)
        .require_finished()
        .history
    )
    rows = history.isel(step=history["phase"].values == "E")
    names = ("data_passes", "seconds", "bound", "log_evidence", "gap")
    return [{n: float(rows[n][i]) for n in names} for i in range(rows.sizes["step"])]


def maximize_by_gradient(
    model: Program,
    guide: Program,
    x: Tensor,
    measure: Callable[[], Row],
    epochs: Sequence[int],
    **options: Any,
) -> list[Row]:
    """A row after so many epochs each: one training, resumed from its checkpoint in between."""
    rows = []
    with TemporaryDirectory() as folder:
        for n in epochs:
            history = (
                fit(
                    model,
                    guide,
                    x,
                    epochs=n,
                    evaluate_every=epochs[-1],
                    checkpoint=Path(folder) / "run",
                    resume=n > epochs[0],
                    **options,
                )
                .require_finished()
                .history
            )
            clock = {name: float(history[name][-1]) for name in ("data_passes", "seconds")}
            rows.append(clock | measure())
    return rows


def measure_mixture(mixture: GaussianMixture, x: Tensor, q: Callable[[], Tensor]) -> Row:
    """The exact log p(x), ELBO and KL of any q over the components, per datum."""
    problem = mixture.prepare(x)
    with torch.no_grad():
        evidence, bound, gap = problem.measure_bound(problem.read(), q())
    return {
        "log_evidence": evidence / len(x),
        "bound": bound / len(x),
        "gap": gap / len(x),
    }


def measure_vae(model: Program, guide: Program, x: Tensor, num_particles: int, seed: int) -> Row:
    """The ELBO by draws, log p(x) by quadrature (one latent: it is exact), and their difference."""
    drawn = log_evidence(model, guide, x, num_particles=num_particles, seed=seed, progress=False)
    exact = log_evidence(model, None, x, method="quadrature", progress=False)
    bound, evidence = drawn.quantity("elbo"), exact.quantity("log_evidence")
    gap = evidence.difference(bound)
    return {"log_evidence": evidence.value, "bound": bound.value, "gap": gap.value}


def warm_up(mixture: GaussianMixture, x: Tensor) -> None:
    """Runs what loads parts of torch at its first use, so that no method's clock pays for it."""
    fit_em(
        mixture, x, method="generalized", initialization="given", max_iterations=1, progress=False
    ).require_finished()
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    fit(mixture.model, mixture.guide, x, loss=loss, epochs=1, progress=False).require_finished()


def maximize_mixture(
    sample: Sample, settings: Settings, say: Callable[[str], None], progress: bool
) -> tuple[dict[str, list[Row]], GaussianMixture]:
    """Every method from the same start; also the mixture that exact EM reached."""
    x, k = sample.x, sample.num_components
    start = GaussianMixture(k, x.shape[1]).double()
    start.initialize(x, sample.start, seed=settings.seed + 3)

    def copied(**arguments: Any) -> GaussianMixture:
        torch.manual_seed(settings.seed)  # the network of an amortised guide
        mixture = GaussianMixture(k, x.shape[1], **arguments).double()
        mixture.generative.load_state_dict(start.generative.state_dict())
        return mixture

    warm_up(copied(), x)
    common: dict[str, Any] = {"seed": settings.seed, "progress": progress}
    of_em = common | {"max_iterations": settings.iterations}
    exact = copied()
    rows = {
        EXACT: maximize_by_em(exact, x, "exact", **of_em),
        GENERALISED: maximize_by_em(copied(), x, "generalized", **of_em),
        SAMPLED: maximize_by_em(
            copied(), x, "monte_carlo", num_samples=settings.num_samples, **of_em
        ),
        ONLINE: maximize_by_em(copied(), x, "online", batch_size=settings.batch_size, **of_em),
    }
    say("  EM and its approximations done; now by gradients")
    loss = partial(TraceEnum_ELBO, max_plate_nesting=1)
    full = common | {"learning_rate": settings.learning_rate, "batch_size": len(x)}
    mixture = copied()
    rows[ENUMERATED] = maximize_by_gradient(
        mixture.model,
        mixture.guide,
        x,
        partial(measure_mixture, mixture, x, partial(mixture.predict_proba, x)),
        settings.epochs,
        loss=loss(),
        **full,
    )
    own, mixture = PerDatumComponents(len(x), k), copied()
    rows[PER_DATUM] = maximize_by_gradient(
        mixture.model,
        own.guide,
        x,
        partial(measure_mixture, mixture, x, partial(own.logits.softmax, 1)),
        settings.epochs,
        loss=loss(),
        **full,
    )
    mixture = copied(guide="amortized", hidden=settings.hidden)
    network = mixture.recognition
    assert network is not None
    rows[AMORTISED] = maximize_by_gradient(
        mixture.model,
        mixture.guide,
        x,
        partial(measure_mixture, mixture, x, lambda: network(x).softmax(1)),
        settings.epochs,
        loss=loss(),
        learning_rate=settings.batch_learning_rate,
        batch_size=settings.batch_size,
        **common,
    )
    return rows, exact


@dataclass(frozen=True)
class Trained:
    """A model and guide at the end of their training."""

    rows: list[Row]
    vae: VAE
    guide: Program


def maximize_vae(
    sample: Sample, settings: Settings, say: Callable[[str], None], progress: bool
) -> dict[str, Trained]:
    """The VAE with parameters for each datum, amortised, and on the importance bound."""
    x = sample.x

    def maximize(loss: ELBO, per_datum: bool = False) -> Trained:
        torch.manual_seed(settings.seed)
        vae = VAE(x.shape[1], 1, settings.hidden, "gaussian").double()
        guide: Program = PerDatumNormals(len(x), 1).guide if per_datum else vae.guide
        rows = maximize_by_gradient(
            vae.model,
            guide,
            x,
            partial(measure_vae, vae.model, guide, x, settings.path_particles, settings.seed),
            settings.vae_epochs,
            loss=loss,
            learning_rate=settings.vae_learning_rate
            if per_datum
            else settings.vae_batch_learning_rate,
            batch_size=len(x) if per_datum else settings.batch_size,
            seed=settings.seed,
            progress=progress,
        )
        return Trained(rows, vae, guide)

    def elbo() -> ELBO:
        return Trace_ELBO(num_particles=settings.vae_particles, vectorize_particles=True)

    found = {PER_DATUM: maximize(elbo(), per_datum=True)}
    say(f"  {PER_DATUM} done")
    found[AMORTISED] = maximize(elbo())
    say(f"  {AMORTISED} done")
    importance = make_estimator("DReG", settings.importance_particles)
    found[IMPORTANCE] = maximize(importance)
    say(f"  {IMPORTANCE} done")
    return found


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


# --- page -----------------------------------------------------------------------------------------

MIXTURE_HEADER = ("method", "log p(x)", "ELBO", "gap", "data passes", "seconds")
VAE_HEADER = (
    "method",
    "log p(x)",
    "by importance",
    "bad k-hat",
    "ELBO",
    "gap",
    "approximation",
    "amortisation",
)


def mixture_rows(ends: Result) -> list[list[str]]:
    """Where each method on the mixture ended, in nats per datum."""
    return [
        [
            str(row["method"].values),
            f"{float(row.log_evidence):.6f}",
            f"{float(row.bound):.6f}",
            f"{float(row.gap):.1e}",
            f"{float(row.data_passes):.0f}",
            f"{float(row.seconds):.2f}",
        ]
        for row in (ends.isel(row=i) for i in range(ends.sizes["row"]))
    ]


def vae_rows(ends: Result) -> list[list[str]]:
    """The gap decomposition of each VAE, in nats per datum with Monte-Carlo standard errors."""
    names = ("bound", "gap", "approximation_gap", "amortization_gap")

    def sure(row: Result, name: str) -> str:
        return f"{float(row[name]):.4f} ± {float(row[name + '_se']):.4f}"

    return [
        [
            str(row["method"].values),
            f"{float(row.log_evidence):.4f}",
            sure(row, "importance"),
            str(int(row.num_bad_khat)),
            *(sure(row, name) for name in names),
        ]
        for row in (ends.isel(method=i) for i in range(ends.sizes["method"]))
    ]


def page_parts(
    sample: Sample,
    settings: Settings,
    mixture_ends: Result,
    vae_ends: Result,
    figures: Mapping[str, Figure],
) -> list[Part]:
    """The page from top to bottom."""
    best = float(mixture_ends["log_evidence"].max())
    spread = best - float(mixture_ends["log_evidence"].min())
    at = {str(n): mixture_ends.isel(row=i) for i, n in enumerate(mixture_ends["method"].values)}
    amortised = vae_ends.sel({"method": AMORTISED})  # xarray has a keyword of that name
    covering = vae_ends.sel({"method": IMPORTANCE})
    reached = float(vae_ends["log_evidence"].max())
    k = sample.num_components
    last = settings.epochs[-1]
    return [
        Paragraph(
            f"The data are {sample.name}: {len(sample.x)} points of {sample.x.shape[1]} features, "
            "each shifted and scaled to mean 0 and variance 1. All numbers are nats per datum."
        ),
        Heading("One identity"),
        Paragraph(
            "A latent variable model says how a hidden z makes the x that we see. Its parameters "
            "are theta. For any distribution q over z, the log-likelihood splits into two parts:"
        ),
        Formula(
            r"\log p_\theta(x) = F(q, \theta) + "
            r"\mathrm{KL}(q(z) \,\|\, p_\theta(z \mid x)), \qquad "
            r"F(q, \theta) = \mathrm{E}_q[\log p_\theta(x, z) - \log q(z)]"
        ),
        Paragraph(
            "F is the evidence lower bound, the ELBO. The KL is never negative, so F never exceeds "
            "log p(x), and it touches it only where q is the posterior p(z | x). Every method for "
            "the mixture increases F, exactly or on average. They differ in two things only: how q "
            "is chosen, and how theta is moved."
        ),
        Heading("Seven ways to fit one mixture"),
        Paragraph(
            f"The model is a mixture of {k} Gaussians with full covariances. All methods start at "
            "the same parameters. Here z is one of a few components, so the sum over z can be "
            "written out, and log p(x), F and the KL below are all exact."
        ),
        Formula(r"p_\theta(x) = \sum_{k} \pi_k \, \mathcal{N}(x \mid \mu_k, \Sigma_k)"),
        Paragraph(
            "1. Exact EM. The E step sets q to the posterior (KL = 0); the M step sets theta to "
            "the maximum of F, which has a closed form for a Gaussian mixture."
        ),
        Formula(
            r"q \leftarrow p_\theta(z \mid x), \qquad \theta \leftarrow "
            r"\mathrm{arg\,max}_\theta \; F(q, \theta)"
        ),
        Paragraph(
            "2. Generalised EM. The same E step, but the M step is a few gradient steps that do "
            "not lower F. It needs no closed form, so it takes any model whose latents can be "
            "summed out; it pays with more passes over the data."
        ),
        Formula(
            r"\theta \leftarrow \theta' \quad \mathrm{with} \quad F(q, \theta') \geq F(q, \theta)"
        ),
        Paragraph(
            f"3. Monte-Carlo EM. q is replaced by the shares of {settings.num_samples} draws from "
            "the posterior. F is no longer touched, and theta keeps trembling about the maximum."
        ),
        Formula(
            r"q(z) \leftarrow \dfrac{1}{S} \sum_{s} \mathbf{1}[z = z^{(s)}], \qquad "
            r"z^{(s)} \sim p_\theta(z \mid x)"
        ),
        Paragraph(
            f"4. Online EM. After each mini-batch of {settings.batch_size} data the expected "
            "sufficient statistics s move a little towards those of the batch, and theta follows. "
            "One pass makes several M steps. (Its last row closes with one full E step, so its "
            "final gap is 0.)"
        ),
        Formula(r"s \leftarrow (1 - \rho_t) \, s + \rho_t \, \hat{s}_t, \qquad \rho_t = t^{-0.6}"),
        Paragraph(
            "5. Enumerated gradient. Sum z out and follow the gradient of log p(x) by Adam. It is "
            "the gradient that an M step starts with: at q = p(z | x) the two are equal (Fisher's "
            "identity), so this is generalised EM with one step at a time."
        ),
        Formula(
            r"\nabla_\theta \log p_\theta(x) = \mathrm{E}_{p_\theta(z \mid x)}"
            r"[\nabla_\theta \log p_\theta(x, z)]"
        ),
        Paragraph(
            "6. Per-datum variational. Give each datum a q of its own with free parameters, here "
            f"{k} logits, and maximise F over q and theta together. No posterior is ever computed: "
            "this is what remains possible where it cannot be. A q that knows nothing at first "
            "pulls all components to the same place, which is why this curve lies flat for so long."
        ),
        Formula(
            r"q_n(z) = \mathrm{softmax}(\lambda_n)_z, \qquad "
            r"(\lambda, \theta) \leftarrow (\lambda, \theta) + \epsilon \, \nabla F"
        ),
        Paragraph(
            "7. Amortised SVI. One network reads x and answers with q; its weights phi are shared "
            "by all data and trained on mini-batches. New data cost one pass through the network."
        ),
        Formula(r"q_\phi(z \mid x) = \mathrm{softmax}(\mathrm{network}_\phi(x))_z"),
        Picture(
            figures["bounds"],
            "Top: the bound (thick) and log p(x) (thin, same colour). Bottom: how far the bound "
            "lies below the best log p(x), cut off at 1e-10, where rounding begins. Seconds are "
            "those of the method, without measuring.",
        ),
        Table(MIXTURE_HEADER, mixture_rows(mixture_ends)),
        Paragraph(
            f"What to see. Exact EM ends at {float(at[EXACT].log_evidence):.6f}, and after {last} "
            "passes the enumerated gradient ends "
            f"{abs(float(at[EXACT].log_evidence - at[ENUMERATED].bound)):.1e} from there. "
            "Monte-Carlo EM cannot settle: its draws leave a gap of "
            f"{float(at[SAMPLED].gap):.1e}. Free parameters for each datum leave one of "
            f"{float(at[PER_DATUM].gap):.1e}, the network one of {float(at[AMORTISED].gap):.1e}. "
            "Neither is forced to: any probabilities of the components can be had from free logits "
            "and, closely enough, from a network. The first gap is unfinished optimisation, since "
            "each datum learns its logits alone, and those of clear cases lie far out. The second "
            "is what one smooth function of x, trained on mini-batches, has not got right for "
            "every datum: the price of amortisation. What it buys is that a datum teaches the q of "
            "all others, and that new data need no optimisation at all."
        ),
        *(
            [
                Note(
                    f"The log p(x) that the methods reached differ by {spread:.3f}: from one start "
                    "they reached different local maxima. Distances from the best then say more "
                    "about the maximum than about the method. Another --seed may bring them "
                    "together."
                )
            ]
            if spread > 0.01
            else []
        ),
        Heading("When the components become a neural decoder"),
        Paragraph(
            f"Let z be a real number with a standard normal prior instead of one of {k} labels, "
            "and let a network say where its Gaussian lies. The sum over components becomes an "
            "integral: a mixture of infinitely many Gaussians along a curve. This is a VAE."
        ),
        Formula(
            r"p_\theta(x) = \int \mathcal{N}(z \mid 0, 1) \; "
            r"\mathcal{N}(x \mid \mathrm{decoder}_\theta(z), \sigma^2 I) \, dz"
        ),
        Picture(
            figures["models"],
            "Left: exact EM's mixture. Right: the VAE after amortised SVI; each circle holds the "
            "same share of the prior.",
        ),
        Paragraph(
            "Of the methods above, those that sum over z are gone: no exact E step, no closed M "
            "step, no enumerated gradient. What is left is q with free parameters for each datum, "
            "q from a network (the encoder), and, in place of the exact gradient, the importance "
            f"bound with {settings.importance_particles} draws, which comes closer to log p(x) the "
            "more draws it has:"
        ),
        Formula(
            r"q_\phi(z \mid x) = \mathcal{N}(z \mid m_\phi(x), s_\phi(x)^2), \qquad "
            r"\log p_\theta(x) \geq \mathrm{E} \left[ \log \dfrac{1}{K} \sum_{k=1}^{K} "
            r"\dfrac{p_\theta(x, z_k)}{q_\phi(z_k \mid x)} \right]"
        ),
        Picture(
            figures["vae_bounds"],
            f"The same picture for the VAE: the ELBO (thick; by {settings.path_particles} draws, "
            "so with some noise) and log p(x) (thin).",
        ),
        Paragraph(
            "The gap also splits. Refit q for every datum, within its family of normals, to its "
            "best: what then remains is the family's fault (approximation: no normal has the shape "
            "of the posterior), what was won is the encoder's fault (amortisation)."
        ),
        Formula(
            r"\log p(x) - F(q) = [\log p(x) - F(q^*)] + [F(q^*) - F(q)], \qquad "
            r"q^* = \mathrm{arg\,max}_{q \; \mathrm{normal}} \; F(q)"
        ),
        Table(VAE_HEADER, vae_rows(vae_ends)),
        Paragraph(
            f"What to see. After amortised SVI the gap is {float(amortised.gap):.4f}: "
            f"{float(amortised.approximation_gap):.4f} of it because the posterior is no normal, "
            f"{float(amortised.amortization_gap):.4f} because the encoder is not the best for each "
            "datum. With free parameters for each datum nothing is amortised: the second part is "
            "then unfinished optimisation and the noise of sampled gradients."
        ),
        Paragraph(
            "The importance bound is another matter. It does not ask q to be close to the "
            "posterior, only to cover it, so that among K draws one is good. So the model may take "
            "shapes whose posterior no normal resembles: log p(x) is "
            f"{float(covering.log_evidence):.4f} against {float(amortised.log_evidence):.4f}, "
            f"while the ELBO of the same q is only {float(covering.bound):.4f}. A large gap does "
            "not make a bad model, and the ELBO alone cannot rank models trained in different ways."
        ),
        Paragraph(
            (
                "Nor is the deeper model the better one here: the highest log p(x) of these VAEs "
                f"is about {reached:.4f}, that of the mixture {best:.4f}. Such clouds are what a "
                "mixture is made for; a curve with round noise has to spend prior probability on "
                "the way between them."
            )
            if reached < best
            else (
                f"The highest log p(x) of these VAEs is about {reached:.4f}, that of the "
                f"mixture {best:.4f}."
            )
        ),
        Paragraph(
            "All of this is about the data that were fitted; which model is better on new data is "
            "another question, which these numbers do not answer."
        ),
        Note(
            "With one latent, log p(x) can be had to many digits by quadrature over z, which is "
            "how the table judges. With twenty it cannot, and one draws from q instead: the column "
            f"'by importance' has {settings.evidence_particles} draws a datum. In expectation it "
            "lies below log p(x). A bad k-hat says for how many data its standard error cannot be "
            "believed, because a few draws carry all the weight; nothing says what q never visits."
        ),
        Heading("Every stage in one chart"),
        Picture(
            figures["parts"],
            "log p(x) = ELBO + KL at the end of every method. Dotted: the best log p(x).",
        ),
        Table(
            ("", "mixture", "VAE"),
            (
                (
                    "log p(x)",
                    "exact: a sum of K terms",
                    "an integral; with many latents, estimated",
                ),
                ("posterior, E step", "exact: Bayes' rule", "out of reach; q approximates it"),
                ("M step", "exact: weighted moments", "gradient steps"),
                ("ELBO", "exact: a sum", "unbiased, by draws from q"),
                ("gap of the best q", "0", "above 0: no normal is the posterior"),
                ("amortisation", "costs a little, saves all E steps", "the same"),
            ),
        ),
    ]


# --- the whole ------------------------------------------------------------------------------------


def run(
    sample: Sample, out: Path, settings: Settings, say: Callable[[str], None], progress: bool
) -> Path:
    """Trains, measures, saves and draws everything; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    say(f"{sample.name}: one mixture, seven methods")
    rows_of, exact = maximize_mixture(sample, settings, say, progress)
    bounds = bounds_result(rows_of, sample.x, exact=True, seed=settings.seed)
    say(f"  {time.perf_counter() - started:.0f} s; now the VAE")
    trained = maximize_vae(sample, settings, say, progress)
    vae_bounds = bounds_result(
        {name: end.rows for name, end in trained.items()},
        sample.x,
        exact=False,
        seed=settings.seed,
    )
    say(f"  {time.perf_counter() - started:.0f} s; now the gaps")
    ends, vae_ends = last_rows(bounds), decompose_gaps(trained, sample.x, settings, progress)
    results = {"bounds": bounds, "vae_bounds": vae_bounds, "vae_ends": vae_ends}
    for name, result in results.items():
        result.save(out / f"{name}.nc")
    figures = {
        "bounds": bounds_figure(bounds, float(bounds["log_evidence"].max())),
        "models": models_figure(sample, exact, trained[AMORTISED].vae),
        "vae_bounds": bounds_figure(vae_bounds, None),
        "parts": parts_figure(ends, vae_ends),
    }
    save_figures(out, figures)
    for header, rows in ((MIXTURE_HEADER, mixture_rows(ends)), (VAE_HEADER, vae_rows(vae_ends))):
        say("\n" + as_text([dict(zip(header, row, strict=True)) for row in rows]))
    page = Page("From EM to the VAE on one bound")
    page.add(*page_parts(sample, settings, ends, vae_ends, figures))
    page.add(*how_it_was_made(bounds, settings, "python -m analyses.em_to_vae"))
    return page.save(out / "report.html")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(
        "em_to_vae",
        "Fits the same Gaussian mixture to the same data in seven ways, from exact EM to an\n"
        "amortised guide, and draws their bounds on the same axes; then replaces the components\n"
        "by a neural decoder, which makes it a VAE, and shows what stays exact.",
        data=DATA,
        data_help=DATA_HELP,
        epilog="It writes report.html (read this one), the figures as PNG, and the numbers as\n"
        "NetCDF: bounds.nc, vae_bounds.nc, vae_ends.nc; pyro_vae.results.load_result reads them.",
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
