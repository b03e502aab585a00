r"""Which ELBO estimator should you train with? Bias, noise and cost, measured where truth is known.

Four parts: an exact linear-Gaussian model (reference in closed form), a small model with binary
latents (reference by enumeration), the toy of Rainforth et al. (2018) and a VAE of digits (pooled
reference). Then the same VAE is trained under each estimator at equal cost. Costs are counted, not
timed: steps, and runs of the programs. The recommendations are computed from these measurements.

    python -m analyses.elbo_estimators
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import Tensor

from analyses.command import Output, make_parser, run_analysis
from analyses.pages import figure_of
from pyro_vae import VAE, LinearGaussian, compare_estimators, fit
from pyro_vae.data import Dataset
from pyro_vae.diagnostics.gradients import (
    enumerated_bound,
    estimator_rows,
    recommend_estimators,
    slope_rows,
    train_at_equal_cost,
    training_rows,
)
from pyro_vae.inference.estimators import make_estimator
from pyro_vae.models import BinaryLatents, RainforthToy
from pyro_vae.plots import plot_estimator_cost, plot_evidence_by_estimator, plot_signal_to_noise
from pyro_vae.results import Result
from pyro_vae.runs import load_training_data

CONTINUOUS = (
    "PathwiseELBO",
    "AnalyticELBO",
    "StickingTheLanding",
    "ScoreFunction",
    "LeaveOneOut",
    "ImportanceWeighted",
    "DReG",
    "VIMCO",
    "ReweightedWakeSleep",
    "WakeDReG",
)
DISCRETE = ("ScoreFunction", "LeaveOneOut", "VIMCO", "ReweightedWakeSleep", "StraightThrough")
ON_THE_VAE = tuple(n for n in CONTINUOUS if n not in ("ScoreFunction", "ReweightedWakeSleep"))
ON_THE_TOY = ("ImportanceWeighted", "DReG", "StickingTheLanding", "VIMCO")
TRAINED = (
    *((name, 1) for name in ("PathwiseELBO", "AnalyticELBO", "StickingTheLanding")),
    *((name, 8) for name in ("PathwiseELBO", "LeaveOneOut", "ImportanceWeighted")),
    *((name, 8) for name in ("DReG", "VIMCO", "WakeDReG")),
)
THEORY = {  # Rainforth et al. (2018); Tucker et al. (2019)
    ("ImportanceWeighted", "b of the guide"): "-1/2",
    ("ImportanceWeighted", "mu of the model"): "+1/2",
    ("DReG", "b of the guide"): "+1/2",
    ("DReG", "mu of the model"): "+1/2",
    ("StickingTheLanding", "b of the guide"): "+1/2 (an average)",
    ("StickingTheLanding", "mu of the model"): "+1/2 (an average)",
    ("VIMCO", "mu of the model"): "+1/2",
}


@dataclass(frozen=True)
class Settings:
    """How much is measured; the defaults take under five minutes on two cores."""

    repeats: int = 200  # gradients of each estimator on the small models and the toy
    vae_repeats: int = 100
    toy_copies: int = 400  # of the toy's datum in a gradient
    toy_particles: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    particles: tuple[int, ...] = (2, 8, 32)  # elsewhere
    hidden: tuple[int, ...] = (100,)
    latent_dim: int = 8
    epochs: int = 30  # of the VAE before its gradients are measured
    trained: tuple[tuple[str, int], ...] = TRAINED
    train_epochs: int = 20  # of each training; half of it at equal runs for those that need two
    train_seeds: int = 8
    evidence_particles: int = 500
    test_data: int = 360  # at most so many
    seed: int = 0


FULL = Settings(
    repeats=2000,
    vae_repeats=500,
    toy_copies=1000,
    toy_particles=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    particles=(2, 8, 32, 128),
    epochs=100,
    train_epochs=1000,
    train_seeds=16,
    evidence_particles=5000,
    test_data=1000,
)


TINY = Settings(
    repeats=8,
    vae_repeats=8,
    toy_copies=5,
    toy_particles=(1, 4),
    particles=(2,),
    hidden=(5,),
    latent_dim=2,
    epochs=1,
    trained=(("PathwiseELBO", 1), ("DReG", 2)),
    train_epochs=2,
    train_seeds=2,
    evidence_particles=10,
    test_data=20,
)


# --- the measurements -----------------------------------------------------------------------------


def measure_linear(settings: Settings, progress: bool) -> Result:
    """The linear-Gaussian model half-way to its optimum, with the ELBO's gradient exact."""
    torch.manual_seed(settings.seed)
    linear = LinearGaussian(data_dim=10, latent_dim=4)
    x = LinearGaussian(data_dim=10, latent_dim=4).sample(50)

    def exact(bound: str, _: int) -> Tensor | None:
        q = linear.amortized_posterior(x)
        return linear.elbo(x, q.mean, torch.diag_embed(q.variance)) if bound == "ELBO" else None

    return compare_estimators(
        linear.model,
        linear.guide,
        x,
        [*CONTINUOUS, Trace_ELBO(vectorize_particles=True), RenyiELBO(vectorize_particles=True)],
        settings.particles,
        repeats=settings.repeats,
        reference=exact,
        seed=settings.seed,
        progress=progress,
    )


def measure_discrete(settings: Settings, progress: bool) -> Result:
    """The model with binary latents, with gradients exact by enumeration where that is feasible."""
    torch.manual_seed(settings.seed)
    pair = BinaryLatents()
    x = torch.bernoulli(torch.full((50, 8), 0.4))

    def exact(bound: str, num_particles: int) -> Tensor | None:
        feasible = bound == "ELBO" or (bound == "IWAE" and num_particles <= 8)
        if not feasible:
            return None
        return enumerated_bound(pair.model, pair.guide, x, bound, num_particles)

    return compare_estimators(
        pair.model,
        pair.guide,
        x,
        [
            *DISCRETE,
            Trace_ELBO(vectorize_particles=True),
            RenyiELBO(alpha=0, vectorize_particles=True),
        ],
        settings.particles,
        repeats=settings.repeats,
        reference=exact,
        seed=settings.seed,
        progress=progress,
    )


def measure_toy(settings: Settings, progress: bool) -> Result:
    """Rainforth's toy in 20 dimensions; copies of one datum raise the SNR by their root."""
    torch.manual_seed(settings.seed)
    x = torch.randn(20) + torch.randn(1000, 20) * 2**0.5
    toy = RainforthToy(x, distance=0.01)
    return compare_estimators(
        toy.model,
        toy.guide,
        x[:1].repeat(settings.toy_copies, 1),
        ON_THE_TOY,
        settings.toy_particles,
        repeats=settings.repeats,
        parameters={"b of the guide": ["b"], "mu of the model": ["mu"]},
        reference="none",
        seed=settings.seed,
        progress=progress,
    )


def measure_vae(data: Dataset, settings: Settings, progress: bool) -> Result:
    """A VAE trained a little, on 100 test data."""
    vae = make_vae(data, settings, settings.seed)
    fit(
        vae.model,
        vae.guide,
        data.train,
        loss=make_estimator("PathwiseELBO"),
        learning_rate=3e-3,
        epochs=settings.epochs,
        evaluate_every=settings.epochs,
        transform=data.transform,
        seed=settings.seed,
        progress=progress,
    ).require_finished()
    return compare_estimators(
        vae.model,
        vae.guide,
        data.test[:100],
        ON_THE_VAE,
        settings.particles,
        repeats=settings.vae_repeats,
        seed=settings.seed,
        progress=progress,
    )


def make_vae(data: Dataset, settings: Settings, seed: int) -> VAE:
    """A VAE for the data at a random start."""
    torch.manual_seed(seed)
    return VAE(data.train.shape[1], settings.latent_dim, settings.hidden, "bernoulli")


def measure_training(data: Dataset, settings: Settings, out: Output) -> Result:
    """The same VAE trained under each estimator at equal cost."""
    return train_at_equal_cost(
        partial(make_vae, data, settings),
        data.train,
        data.test[: settings.test_data],
        settings.trained,
        epochs=settings.train_epochs,
        num_seeds=settings.train_seeds,
        evidence_particles=settings.evidence_particles,
        transform=data.transform,
        config={"hidden": list(settings.hidden), "latent_dim": settings.latent_dim},
        seed=settings.seed,
        say=lambda line: out.say(f"  {line}"),
        progress=out.progress,
    )


# --- tables ---------------------------------------------------------------------------------------


def recommendation_rows(parts: Mapping[str, Result]) -> list[dict[str, str]]:
    """What to use, from the fewest to the most particles that were measured."""
    rows = []
    for latents, result in parts.items():
        particles = result["num_particles"].values
        size = {str(particles[0]): "small", str(particles[-1]): "large"}
        rows += [
            {
                "latents": latents,
                "K": f"{size[row.pop('K')]} ({k})",
                "to maximise": row.pop("bound"),
            }
            | row
            for row in recommend_estimators(result)
            if (k := row["K"]) in size and row["bound"] in ("ELBO", "IWAE")
        ]
    return rows


# --- figures -------------------------------------------------------------------------------------


def snr_figure(result: Result, title: str) -> Figure:
    """A panel of SNR against K for each group of parameters."""
    groups = result["parameter"].values
    figure = Figure(figsize=(6.4 * len(groups), 5.2), layout="constrained")
    for ax, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        plot_signal_to_noise(result, ax, parameter=str(group))
        ax.set_title(f"{title}: {group}")
    return figure


def cost_figure(parts: Mapping[str, Result]) -> Figure:
    """Noise against cost of the guide's gradient, a panel for each model."""
    figure = Figure(figsize=(6.0 * len(parts), 5.4), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    for ax, (title, result) in zip(panels, parts.items(), strict=True):
        plot_estimator_cost(result, ax)
        ax.set_title(title)
    return figure


# --- the whole ------------------------------------------------------------------------------------


def run(data: Dataset, settings: Settings, out: Output) -> Path:
    """Measures, saves and draws everything; returns the page's path."""
    measured: dict[str, Result] = {}
    measures: dict[str, Callable[[Settings, bool], Result]] = {
        "linear": measure_linear,
        "discrete": measure_discrete,
        "toy": measure_toy,
        "vae": partial(measure_vae, data),
    }
    for name, measure in measures.items():
        with out.timed(f"measured {name}"):
            measured[name] = measure(settings, out.progress)
            out.save({name: measured[name]})
    out.say(
        f"training {settings.train_seeds} times for {settings.train_epochs} epochs under each "
        "estimator"
    )
    trained = measure_training(data, settings, out)
    out.save({"training": trained})
    linear, discrete, toy, vae = measured.values()
    on_data, by_passes = f"VAE on {data.name}", trained.sel(budget="passes")
    return out.write_page(
        data=data.name,
        settings=settings,
        made=trained.provenance,
        notes={n: r.provenance["notes"] for n, r in (measured | {"training": trained}).items()},
        recommendations=recommendation_rows({"continuous (VAE)": vae, "discrete": discrete}),
        trained_best=training_rows(trained)[:3],
        training=figure_of(plot_evidence_by_estimator(by_passes, data=data.name)),
        equal_passes=training_rows(trained, "passes"),
        equal_steps=training_rows(trained, "steps"),
        snr_toy=snr_figure(toy, "Rainforth's toy"),
        slopes=slope_rows(toy, THEORY),
        cost=cost_figure({"linear-Gaussian": linear, "binary latents": discrete, on_data: vae}),
        linear=estimator_rows(linear, "guide"),
        discrete=estimator_rows(discrete, "guide"),
        vae=estimator_rows(vae, "guide"),
        snr_vae=snr_figure(vae, on_data),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis from the command line."""
    parser = make_parser(
        "elbo_estimators",
        (__doc__ or "").rsplit("\n\n", 1)[0],
        data=("digits", "mnist"),
        full="ten times as much of everything",
    )
    parser.add_argument("--repeats", type=int, help="gradients of each estimator")
    parser.add_argument("--train-epochs", type=int, help="epochs of each training at equal steps")
    given = parser.parse_args(arguments)
    settings = replace(TINY if given.tiny else FULL if given.full else Settings(), seed=given.seed)
    if given.data == "mnist":
        settings = replace(settings, hidden=(200,), latent_dim=20)
    if given.repeats is not None:
        settings = replace(settings, repeats=given.repeats, vae_repeats=given.repeats)
    if given.train_epochs is not None:
        settings = replace(settings, train_epochs=given.train_epochs)

    def analysis(out: Output) -> Path:
        data = load_training_data(given.data, given.root, binarization="dynamic")
        return run(data, settings, out)

    return run_analysis(analysis, given)


if __name__ == "__main__":
    sys.exit(main())
