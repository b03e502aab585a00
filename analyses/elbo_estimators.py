r"""Which ELBO estimator should you train with? Bias, noise and cost, measured where truth is known.

Four parts: an exact linear-Gaussian model (reference in closed form), a small model with binary
latents (reference by enumeration), the toy of Rainforth et al. (2018) and a VAE of digits (pooled
reference). Then the same VAE is trained under each estimator for equal processor time. The
recommendations at the end are computed from these measurements.

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

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO
from torch import Tensor, nn

from pyro_vae import VAE, LinearGaussian, fit, log_evidence
from pyro_vae.data import Dataset
from pyro_vae.diagnostics.enumeration import enumerated_bound
from pyro_vae.diagnostics.gradients import (
    compare_estimators,
    estimator_rows,
    recommend_estimators,
    snr_slopes,
)
from pyro_vae.files import atomic_path
from pyro_vae.inference.estimators import make_estimator
from pyro_vae.pages import Heading, Page, Paragraph, Picture, Table, Verbatim, figure_png
from pyro_vae.plots import plot_estimator_cost, plot_evidence_by_estimator, plot_signal_to_noise
from pyro_vae.results import Result, label, make_result, sha256_of
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
DISCRETE = (
    "ScoreFunction",
    "LeaveOneOut",
    "VIMCO",
    "ReweightedWakeSleep",
    "StraightThrough",
)
ON_THE_VAE = (
    "PathwiseELBO",
    "AnalyticELBO",
    "StickingTheLanding",
    "LeaveOneOut",
    "ImportanceWeighted",
    "DReG",
    "VIMCO",
    "WakeDReG",
)
ON_THE_TOY = ("ImportanceWeighted", "DReG", "StickingTheLanding", "VIMCO")
TRAINED = (
    ("PathwiseELBO", 1),
    ("AnalyticELBO", 1),
    ("StickingTheLanding", 1),
    ("PathwiseELBO", 8),
    ("LeaveOneOut", 8),
    ("ImportanceWeighted", 8),
    ("DReG", 8),
    ("VIMCO", 8),
    ("WakeDReG", 8),
)


@dataclass(frozen=True)
class Settings:
    """How much is measured; the defaults take under five minutes on two cores.

    Attributes:
        repeats: Gradients of each estimator on the small models and the toy.
        vae_repeats: Gradients of each estimator on the VAE.
        toy_copies: Independent copies of the toy's datum in a gradient.
        toy_particles: The numbers of particles on the toy.
        particles: The numbers of particles elsewhere.
        hidden: Hidden units of the VAE.
        latent_dim: Latents of the VAE.
        epochs: Epochs that the VAE is trained before its gradients are measured.
        trained: The estimators and numbers of particles to train with.
        train_seconds: Processor time of each training at equal time.
        timing_rounds: How often an epoch of each is timed; the least time counts.
        train_seeds: Trainings of each estimator.
        evidence_particles: Particles of the test evidence.
        test_data: At most so many test data.
        seed: Seeds everything.
    """

    repeats: int = 200
    vae_repeats: int = 100
    toy_copies: int = 400
    toy_particles: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    particles: tuple[int, ...] = (2, 8, 32)
    hidden: tuple[int, ...] = (100,)
    latent_dim: int = 8
    epochs: int = 30
    trained: tuple[tuple[str, int], ...] = TRAINED
    train_seconds: float = 3.0
    timing_rounds: int = 3
    train_seeds: int = 2
    evidence_particles: int = 1000
    test_data: int = 360
    seed: int = 0


FULL = Settings(
    repeats=2000,
    vae_repeats=500,
    toy_copies=1000,
    toy_particles=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    particles=(2, 8, 32, 128),
    epochs=100,
    train_seconds=60.0,
    train_seeds=4,
    evidence_particles=5000,
    test_data=1000,
)


# --- the models -----------------------------------------------------------------------------------


class BinaryLatents(nn.Module):
    """Three binary latents, eight binary pixels and an amortised guide."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.randn(3))
        self.decoder = nn.Linear(3, 8)
        self.encoder = nn.Linear(8, 3)

    def model(self, x: Tensor) -> None:
        """Latent bits, then pixels given them."""
        pyro.module("decoder", self.decoder)
        logits = pyro.param("prior", self.prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Latent bits given pixels, independent of each other."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


class RainforthToy(nn.Module):
    """z ~ N(mu, I), x | z ~ N(z, I) and q = N(A x + b, 2/3 I), close to the optimum for data x."""

    def __init__(self, x: Tensor, distance: float) -> None:
        super().__init__()
        dim = x.shape[-1]

        def near(optimum: Tensor) -> nn.Parameter:
            return nn.Parameter(optimum + distance * torch.randn(optimum.shape))

        self.mu = near(x.mean(0))
        self.matrix = near(torch.eye(dim) / 2)
        self.shift = near(x.mean(0) / 2)

    def model(self, x: Tensor) -> None:
        """A normal around mu, seen with unit noise."""
        mu = pyro.param("mu", self.mu)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """An affine map of x with fixed variance 2/3."""
        loc = x @ pyro.param("A", self.matrix).mT + pyro.param("b", self.shift)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, (2 / 3) ** 0.5).to_event(1))


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
    train(vae, data, make_estimator("PathwiseELBO"), settings.epochs, settings.seed, progress)
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


def train(vae: VAE, data: Dataset, loss: ELBO, epochs: int, seed: int, progress: bool) -> float:
    """Trains in place; returns the processor time in seconds."""
    started = time.thread_time()
    fit(
        vae.model,
        vae.guide,
        data.train,
        loss=loss,
        learning_rate=3e-3,
        epochs=epochs,
        evaluate_every=epochs,
        transform=data.transform,
        seed=seed,
        progress=progress,
    )
    return time.thread_time() - started


def time_epochs(data: Dataset, settings: Settings) -> dict[tuple[str, int], float]:
    """Processor seconds of an epoch: the least of rounds, so that a busy moment does not count."""
    times = dict.fromkeys(settings.trained, float("inf"))
    for _ in range(settings.timing_rounds):
        for name, k in settings.trained:
            once, six = (
                train(make_vae(data, settings, 0), data, make_estimator(name, k), n, 0, False)
                for n in (1, 6)
            )
            times[name, k] = min(times[name, k], max((six - once) / 5, 1e-3))
    return times


def train_at_equal_time(
    data: Dataset, settings: Settings, say: Callable[[str], None], progress: bool
) -> Result:
    """Trains the same VAE under each estimator for equal time; test evidence of each."""
    test = data.test[: settings.test_data]
    names = [f"{name} K={k}" for name, k in settings.trained]
    shape = (len(settings.trained), settings.train_seeds)
    columns = {
        name: np.full(shape, np.nan)
        for name in ("log_evidence", "log_evidence_se", "elbo", "elbo_se", "epochs", "seconds")
    }
    times = time_epochs(data, settings)
    for i, (name, k) in enumerate(settings.trained):
        epochs = max(1, round(settings.train_seconds / times[name, k]))
        for seed in range(settings.train_seeds):
            vae = make_vae(data, settings, seed)
            seconds = train(vae, data, make_estimator(name, k), epochs, seed, progress)
            found = log_evidence(
                vae.model,
                vae.guide,
                test,
                num_particles=settings.evidence_particles,
                seed=settings.seed,
                progress=progress,
            )
            for column in ("log_evidence", "elbo"):
                quantity = found.quantity(column)
                columns[column][i, seed] = quantity.value
                columns[f"{column}_se"][i, seed] = quantity.standard_error
            columns["epochs"][i, seed], columns["seconds"][i, seed] = epochs, seconds
        say(f"  {names[i]}: {columns['log_evidence'][i].mean():.2f} after {epochs} epochs")
    attrs = {
        "log_evidence": label(
            bound="lower",
            measure=data.measure,
            num_particles=settings.evidence_particles,
            description="mean over test data, importance-weighted",
        ),
        "elbo": label(bound="lower", measure=data.measure, description="mean over test data"),
        "epochs": label(unit="none", reduction="none", bound="none"),
        "seconds": label(unit="seconds", reduction="none", bound="none"),
    }
    return make_result(
        {
            name: (("estimator", "training_seed"), column, attrs.get(name, {}))
            for name, column in columns.items()
        },
        function="train_at_equal_time",
        config={
            "train_seconds": settings.train_seconds,
            "evidence_particles": settings.evidence_particles,
            "num_data": len(test),
            "hidden": list(settings.hidden),
            "latent_dim": settings.latent_dim,
        },
        seed=settings.seed,
        data_sha256=sha256_of(test),
        coords={"estimator": names, "training_seed": np.arange(settings.train_seeds)},
        notes=[
            "Standard errors are those of the Monte-Carlo draws; the spread over training seeds is "
            "larger.",
        ],
    )


# --- tables ---------------------------------------------------------------------------------------


def training_rows(trained: Result) -> list[dict[str, str]]:
    """Test evidence by estimator, best first, with the spread over training seeds."""
    seeds = trained.sizes["training_seed"]
    mean = trained["log_evidence"].mean("training_seed").values
    error = evidence_error(trained)
    elbo = trained["elbo"].mean("training_seed").values
    rows = []
    for i in np.argsort(-mean):
        rows.append(
            {
                "trained with": str(trained["estimator"].values[i]),
                "test log evidence": f"{mean[i]:.2f} ± {error:.2f}",
                "behind the best": f"{mean.max() - mean[i]:.2f} ± {error * 2**0.5:.2f}",
                "test ELBO": f"{elbo[i]:.2f}",
                "epochs": f"{trained['epochs'].values[i, 0]:.0f}",
                "processor s": f"{trained['seconds'].values[i].mean():.1f}",
                "seeds": str(seeds),
            }
        )
    return rows


def evidence_error(trained: Result) -> float:
    """Standard error of a mean over training seeds, their spread pooled over estimators."""
    values, errors = trained["log_evidence"].values, trained["log_evidence_se"].values
    seeds = values.shape[1]
    variance = values.var(1, ddof=1).mean() if seeds > 1 else (errors**2).mean()
    return float((variance / seeds) ** 0.5)


def recommendation_rows(parts: Mapping[str, Result]) -> list[dict[str, str]]:
    """What to use, from the fewest to the most particles that were measured."""
    rows = []
    for latents, result in parts.items():
        particles = result["num_particles"].values
        size = {str(particles[0]): "small", str(particles[-1]): "large"}
        rows += [
            {"latents": latents, "K": f"{size[row.pop('K')]} ({k})", "to climb": row.pop("bound")}
            | row
            for row in recommend_estimators(result)
            if (k := row["K"]) in size and row["bound"] in ("ELBO", "IWAE")
        ]
    return rows


def slope_rows(toy: Result, theory: Mapping[tuple[str, str], str]) -> list[dict[str, str]]:
    """Fitted slopes of log SNR against log K beside the theory."""
    slopes = snr_slopes(toy)
    late = snr_slopes(toy.sel(num_particles=slice(8, None)))
    return [
        {
            "estimator": str(name),
            "parameter": str(group),
            "slope": slope_text(slopes.sel(estimator=name, parameter=group)),
            "slope from K = 8": slope_text(late.sel(estimator=name, parameter=group)),
            "theory, large K": theory.get((str(name), str(group)), "-"),
        }
        for name in slopes["estimator"].values
        for group in slopes["parameter"].values
    ]


def slope_text(row: Result) -> str:
    """A slope with its standard error and the number of points behind it."""
    points = int(row.num_points)
    if points < 2:
        return "-"
    return f"{float(row.slope):+.3f} ± {float(row.slope_se):.3f} ({points} points)"


THEORY = {  # Rainforth et al. (2018), theorem 1; Tucker et al. (2019), section 4
    ("ImportanceWeighted", "b of the guide"): "-1/2",
    ("ImportanceWeighted", "mu of the model"): "+1/2",
    ("DReG", "b of the guide"): "+1/2",
    ("DReG", "mu of the model"): "+1/2",
    ("StickingTheLanding", "b of the guide"): "+1/2 (an average)",
    ("StickingTheLanding", "mu of the model"): "+1/2 (an average)",
    ("VIMCO", "mu of the model"): "+1/2",
}


def as_text(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as an aligned table."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


# --- figures and page -----------------------------------------------------------------------------


def snr_figure(result: Result, title: str) -> Figure:
    """A panel of SNR against K for each group of parameters."""
    groups = result["parameter"].values
    figure = Figure(figsize=(6.4 * len(groups), 5.2), layout="constrained")
    for ax, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        plot_signal_to_noise(result, ax, parameter=str(group))
        ax.set_title(f"{title}: {group}")
    return figure


def cost_figure(parts: Mapping[str, Result]) -> Figure:
    """Noise against time of the guide's gradient, a panel for each model."""
    figure = Figure(figsize=(6.0 * len(parts), 5.4), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    for ax, (title, result) in zip(panels, parts.items(), strict=True):
        plot_estimator_cost(result, ax)
        ax.set_title(title)
    return figure


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str
    title: str
    text: str
    tables: tuple[list[dict[str, str]], ...] = ()
    figure: Figure | None = None
    notes: tuple[str, ...] = ()


def write_page(path: Path, sections: Sequence[Section], made: str) -> None:
    """One HTML file that needs no network."""
    page = Page("Which ELBO estimator to train with")
    for section in sections:
        page.add(Heading(section.title), Paragraph(section.text))
        if section.figure is not None:
            page.add(Picture(section.figure, section.title))
        page.add(*(Table(list(t[0]), [list(row.values()) for row in t]) for t in section.tables))
        page.add(*(Paragraph(note) for note in section.notes))
    page.add(Heading("How it was made"), Paragraph(made))
    page.add(Verbatim("python -m analyses.elbo_estimators"))
    page.save(path)


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
    say(f"training for {settings.train_seconds:g} processor seconds under each estimator")
    trained = train_at_equal_time(data, settings, say, progress)
    trained.save(out / "training.nc")
    sections = describe(measured, trained, data)
    for section in sections:
        if section.figure is not None:
            with atomic_path(out / f"{section.name}.png") as temporary:
                temporary.write_bytes(figure_png(section.figure))
        say(f"\n## {section.title}\n{section.text}\n")
        for rows in section.tables:
            say(f"{as_text(rows)}\n")
    page = out / "report.html"
    made = trained.provenance
    write_page(
        page,
        sections,
        f"pyro_vae {made['version']}, torch {made['torch']}, {made['created']}, seed "
        f"{settings.seed}, one thread; {settings.repeats} gradients of each estimator "
        f"({settings.vae_repeats} on the VAE).",
    )
    return page


def describe(measured: Mapping[str, Result], trained: Result, data: Dataset) -> list[Section]:
    """Sections in the order of the page."""
    linear, discrete, toy, vae = (measured[n] for n in ("linear", "discrete", "toy", "vae"))
    on_data = f"VAE on {data.name}"

    def notes(result: Result) -> tuple[str, ...]:
        return tuple(result.provenance["notes"])

    costs = cost_figure({"linear-Gaussian": linear, "binary latents": discrete, on_data: vae})
    by_evidence = plot_evidence_by_estimator(trained, data=data.name).figure
    assert isinstance(by_evidence, Figure)
    return [
        Section(
            "recommendations",
            "Recommendations",
            "Of the estimators without a bias in sight, the one whose guide gradient has the least "
            "variance x time, computed from the tables below; then what trained best.",
            (
                recommendation_rows({"continuous (VAE)": vae, "discrete": discrete}),
                training_rows(trained)[:3],
            ),
        ),
        Section(
            "training",
            "Trained for equal time",
            "The same VAE, the same starts, the same processor time. Higher is better; nats per "
            "test datum, a lower bound. The error is that of a mean over training seeds.",
            (training_rows(trained),),
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
            "Noise against time",
            "Variance of the guide's gradient against its time, a line from few to many particles "
            "for each estimator. Grey lines join equal variance x time; biased ones are hollow.",
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
    parser = argparse.ArgumentParser(
        prog="python -m analyses.elbo_estimators", description=(__doc__ or "").split("\n\n")[0]
    )
    defaults = Settings()
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--root", help="folder of the data files (MNIST)")
    parser.add_argument("--out", type=Path, default=Path("results/elbo_estimators"))
    parser.add_argument("--full", action="store_true", help="ten times as much of everything")
    parser.add_argument("--repeats", type=int, help="gradients of each estimator")
    parser.add_argument("--train-seconds", type=float, help="processor time of each training")
    parser.add_argument("--tiny", action="store_true", help="a few seconds: does it run at all?")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--no-progress", action="store_true")
    return parser.parse_args(arguments)


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
    train_seconds=0.01,
    timing_rounds=1,
    train_seeds=1,
    evidence_particles=10,
    test_data=20,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis from the command line."""
    given = parse(arguments)
    settings = replace(TINY if given.tiny else FULL if given.full else Settings(), seed=given.seed)
    if given.data == "mnist":
        settings = replace(settings, hidden=(200,), latent_dim=20)
    changes: dict[str, Any] = {}
    if given.repeats is not None:
        changes |= {"repeats": given.repeats, "vae_repeats": given.repeats}
    if given.train_seconds is not None:
        changes["train_seconds"] = given.train_seconds
    settings = replace(settings, **changes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that times compare, and two cores do not make them worse
    try:
        data = load_training_data(given.data, given.root, binarization="dynamic")
        page = run(data, given.out, settings, partial(print, flush=True), not given.no_progress)
    finally:
        torch.set_num_threads(threads)
    print(f"\n{page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
