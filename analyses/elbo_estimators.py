r"""Which ELBO estimator should you train with? Bias, noise and cost, measured where truth is known.

Four parts: an exact linear-Gaussian model (reference in closed form), a small model with binary
latents (reference by enumeration), the toy of Rainforth et al. (2018) and a VAE of digits (pooled
reference). Then the same VAE is trained under each estimator at equal cost. Costs are counted, not
timed: steps, and runs of the programs. The recommendations are computed from these measurements.

    python -m analyses.elbo_estimators
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import Tensor

from analyses.command import make_parser, out_folder, run_on_one_thread
from analyses.sections import Section, as_text, save_sections
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


def measure_training(
    data: Dataset, settings: Settings, say: Callable[[str], None], progress: bool
) -> Result:
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
        say=lambda line: say(f"  {line}"),
        progress=progress,
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


def run(
    data: Dataset, out: Path, settings: Settings, say: Callable[[str], None], progress: bool
) -> Path:
    """Measures, saves and draws everything; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Result] = {}
    measures: dict[str, Callable[[Settings, bool], Result]] = {
        "linear": measure_linear,
        "discrete": measure_discrete,
        "toy": measure_toy,
        "vae": partial(measure_vae, data),
    }
    for name, measure in measures.items():
        started = time.perf_counter()
        measured[name] = measure(settings, progress)
        measured[name].save(out / f"{name}.nc")
        say(f"measured {name} in {time.perf_counter() - started:.0f} s")
    say(
        f"training {settings.train_seeds} times for {settings.train_epochs} epochs under each "
        "estimator"
    )
    trained = measure_training(data, settings, say, progress)
    trained.save(out / "training.nc")
    sections = describe(measured, trained, data)
    for section in sections:
        say(f"\n## {section.title}\n{section.text}\n")
        for rows in section.tables:
            say(f"{as_text(rows)}\n")
    made = trained.provenance
    return save_sections(
        out,
        "Which ELBO estimator to train with",
        sections,
        f"pyro_vae {made['version']}, torch {made['torch']}, {made['created']}, seed "
        f"{settings.seed}, one thread; {settings.repeats} gradients of each estimator "
        f"({settings.vae_repeats} on the VAE).",
        "python -m analyses.elbo_estimators",
    )


def describe(measured: Mapping[str, Result], trained: Result, data: Dataset) -> list[Section]:
    """Sections in the order of the page."""
    linear, discrete, toy, vae = (measured[n] for n in ("linear", "discrete", "toy", "vae"))
    on_data = f"VAE on {data.name}"

    def notes(result: Result) -> tuple[str, ...]:
        return tuple(result.provenance["notes"])

    costs = cost_figure({"linear-Gaussian": linear, "binary latents": discrete, on_data: vae})
    by_evidence = plot_evidence_by_estimator(trained.sel(budget="passes"), data=data.name).figure
    assert isinstance(by_evidence, Figure)
    return [
        Section(
            "recommendations",
            "Recommendations",
            "Of the estimators without a bias in sight, the one whose guide gradient has the least "
            "variance x passes, computed from the tables below; then what trained best at equal "
            "passes.",
            (
                recommendation_rows({"continuous (VAE)": vae, "discrete": discrete}),
                training_rows(trained)[:3],
            ),
        ),
        Section(
            "training",
            "Trained at equal cost",
            "The same VAE, the same starts and orders of the data; higher is better, in nats per "
            "test datum, a lower bound. First at equal runs of the programs, of which some "
            "estimators need two a step, so that they make half the steps; then at equal steps. "
            "Errors are over trainings; differences are taken seed by seed, and called real where "
            "a t-test says so for all pairs together at a level of 0.05. Particles run together, "
            "so compare within a K.",
            (training_rows(trained, "passes"), training_rows(trained, "steps")),
            by_evidence,
            notes(trained),
        ),
        Section(
            "snr_toy",
            "Tighter bounds are not necessarily better",
            "Signal-to-noise ratio against K near the optimum of Rainforth's toy. More particles "
            "tighten the bound; by theory the SNR of the guide's IWAE gradient falls as K^-1/2.",
            (slope_rows(toy, THEORY),),
            snr_figure(toy, "Rainforth's toy"),
            notes(toy),
        ),
        Section(
            "cost",
            "Noise against cost",
            "Variance of the guide's gradient against the passes it takes (runs with one particle, "
            "the same on every machine), a line from few to many particles for each estimator. "
            "Grey lines join equal variance x passes; biased ones are hollow.",
            figure=costs,
        ),
        Section(
            "linear",
            "Linear-Gaussian model, guide",
            "The gradient of the ELBO in closed form is the reference of ELBO estimators.",
            (estimator_rows(linear, "guide"),),
            notes=notes(linear),
        ),
        Section(
            "discrete",
            "Binary latents, guide",
            "Exact gradients by enumerating every outcome of every particle, up to K = 8.",
            (estimator_rows(discrete, "guide"),),
            notes=notes(discrete),
        ),
        Section(
            "snr_vae",
            f"{on_data}, guide",
            "Nothing is exact here: references are pooled.",
            (estimator_rows(vae, "guide"),),
            snr_figure(vae, on_data),
            notes(vae),
        ),
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(
        "elbo_estimators",
        (__doc__ or "").rsplit("\n\n", 1)[0],
        data=("digits", "mnist"),
        full="ten times as much of everything",
    )
    parser.add_argument("--repeats", type=int, help="gradients of each estimator")
    parser.add_argument("--train-epochs", type=int, help="epochs of each training at equal steps")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis from the command line."""
    given = parse(arguments)
    settings = replace(TINY if given.tiny else FULL if given.full else Settings(), seed=given.seed)
    if given.data == "mnist":
        settings = replace(settings, hidden=(200,), latent_dim=20)
    changes: dict[str, Any] = {}
    if given.repeats is not None:
        changes |= {"repeats": given.repeats, "vae_repeats": given.repeats}
    if given.train_epochs is not None:
        changes["train_epochs"] = given.train_epochs
    settings = replace(settings, **changes)
    say = partial(print, flush=True)

    def analysis(out: Path) -> Path:
        data = load_training_data(given.data, given.root, binarization="dynamic")
        return run(data, out, settings, say, not given.no_progress)

    return run_on_one_thread(analysis, out_folder(given))


if __name__ == "__main__":
    sys.exit(main())
