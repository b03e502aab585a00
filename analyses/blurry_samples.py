r"""What makes the samples of a VAE blurry? Five suspects, one decoder, the same data.

The likelihood family, the guide's family and the bound, the prior, the divergence that training
minimises, and the size of the code: one is changed at a time, the decoder network stays. Every
generator is measured in the same way (Frechet distance in a stated feature space, precision and
recall, power at high frequencies, copies of training images, held-out log p(x)), and so is
held-out data, which says what perfect samples would get.

    python -m analyses.blurry_samples
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn

from analyses.command import make_parser, out_folder, run_on_one_thread
from analyses.sections import Section, as_text, save_sections
from pyro_vae import VAE, fit, load_dataset, log_evidence
from pyro_vae.data import Dataset
from pyro_vae.extras.f_divergence import fit_divergence
from pyro_vae.extras.samples import Features, high_frequency_power, make_features, sample_quality
from pyro_vae.inference.estimators import make_estimator
from pyro_vae.models import TwoStageVAE, on_levels
from pyro_vae.plots import pixels_text, plot_power, plot_sample_rows, plot_sharpness
from pyro_vae.results import Result

Part = str | Mapping[str, Any]
SHARED: Part = {"name": "gaussian", "scale": "shared"}
BASE = "Gaussian, shared scale"
SUSPECTS = {
    "likelihood": "the likelihood family",
    "bound": "the guide's family and the bound",
    "prior": "the prior",
    "divergence": "the divergence that training minimises",
    "code": "the size of the code",
}
# Rybkin, Daniilidis & Levine (2021), table 3: MNIST, -log p (upper bound) and FID.
PUBLISHED = (
    ("Gaussian, variance fixed at 1", "740.5", "59.9"),
    ("Gaussian, beta tuned", "-796.2", "53.23"),
    ("Gaussian, scale per pixel", "-2895", "132.5"),
    ("Gaussian, shared scale", "-896.1", "32.18"),
    ("Bernoulli", "not given", "32.22"),
)


@dataclass(frozen=True)
class Case:
    """One generator: what sets it apart from the base, and under which suspect."""

    suspect: str
    title: str
    likelihood: Part = field(default_factory=lambda: SHARED)
    prior: Part = "normal"
    posterior: Part = "diagonal"
    latent_dim: int | None = None
    estimator: str | None = None
    adversarial: "Adversarial | None" = None
    two_stage: bool = False


@dataclass(frozen=True)
class Adversarial:
    """How a critic trains a decoder; what each divergence needs was found by trial on the digits.

    Attributes:
        divergence: A name of `f_divergences.F_DIVERGENCES`.
        noise: Standard deviation of the noise that the critic sees data and samples through.
        learning_rate: Of the decoder.
        critic_learning_rate: Of the critic.
    """

    divergence: str
    noise: float = 0.3
    learning_rate: float = 1e-3
    critic_learning_rate: float = 5e-3


CASES = (
    Case("base", BASE),
    Case("likelihood", "Gaussian, scale 1", {"name": "gaussian", "scale": 1.0}),
    Case("likelihood", "Gaussian, scale 0.1", {"name": "gaussian", "scale": 0.1}),
    Case("likelihood", "Gaussian, scale per pixel", {"name": "gaussian", "scale": "pixel"}),
    Case("likelihood", "continuous Bernoulli", "continuous_bernoulli"),
    Case("likelihood", "discretised logistic", "discretized_logistic"),
    Case("bound", "full normal guide", posterior="full"),
    Case("bound", "IAF guide", posterior="iaf"),
    Case("bound", "IWAE, K = 8", estimator="ImportanceWeighted"),
    Case("prior", "VampPrior", prior="vamp"),
    Case("prior", "flow prior", prior="flow"),
    Case("prior", "two-stage", two_stage=True),
    Case(
        "divergence", "KL, by critic", adversarial=Adversarial("kl", 0.6, critic_learning_rate=1e-3)
    ),
    Case("divergence", "reverse KL", adversarial=Adversarial("reverse_kl")),
    Case("divergence", "Jensen-Shannon", adversarial=Adversarial("jensen_shannon")),
    Case(
        "divergence",
        "squared Hellinger",
        adversarial=Adversarial("squared_hellinger", 0.3, 5e-4, 2e-3),
    ),
    Case("code", "2 latents", latent_dim=2),
    Case("code", "64 latents", latent_dim=64),
)


@dataclass(frozen=True)
class Settings:
    """How much is trained and measured; the defaults take about three minutes.

    Attributes:
        latent_dim: Latents of the base.
        hidden: Hidden units of every decoder, and in reverse of every encoder.
        epochs: Of every training by a bound.
        adversarial_epochs: Of every training by a critic.
        num_starts: Trainings of the base, whose spread tells luck from difference.
        batch_size: Of the training.
        learning_rate: Of the training by a bound.
        num_particles: Draws for the held-out log p(x) of each datum.
        num_samples: Generated images.
        num_train: At most so many training images.
        num_test: At most so many held-out images.
        features: The feature space of Frechet distance, precision and recall.
        cases: Titles of the generators; all if empty.
        seed: Seeds everything.
    """

    latent_dim: int = 16
    hidden: tuple[int, ...] = (128,)
    epochs: int = 120
    adversarial_epochs: int = 150
    num_starts: int = 3
    batch_size: int = 64
    learning_rate: float = 2e-3
    num_particles: int = 200
    num_samples: int = 2000
    num_train: int = 10_000
    num_test: int = 2000
    features: str = "classifier"
    cases: tuple[str, ...] = ()
    seed: int = 0


TINY = Settings(
    latent_dim=2,
    hidden=(5,),
    epochs=1,
    adversarial_epochs=1,
    num_starts=2,
    num_particles=5,
    num_samples=40,
    num_train=100,
    num_test=40,
    features="pca",
    cases=(BASE, "continuous Bernoulli", "discretised logistic", "two-stage", "Jensen-Shannon"),
)


@dataclass(frozen=True)
class Measured:
    """One generator and what was found.

    Attributes:
        case: What it is.
        means: Generated means of x given z, `[samples, pixels]`.
        quality: `sample_quality` of the means.
        noisy: `sample_quality` of draws of x given z.
        evidence: Held-out log p(x), from below.
        seconds: Of training.
    """

    case: Case
    means: Tensor
    quality: Result
    noisy: Result
    evidence: Result
    seconds: float


# --- training -------------------------------------------------------------------------------------


def train(case: Case, data: Dataset, settings: Settings, progress: bool) -> VAE | TwoStageVAE:
    """Builds and trains one generator."""
    torch.manual_seed(settings.seed)
    vae = VAE(
        data.train.shape[1],
        case.latent_dim or settings.latent_dim,
        settings.hidden,
        likelihood=case.likelihood,
        prior=case.prior,
        posterior=case.posterior,
    )
    if case.adversarial is not None:
        return train_by_critic(vae, case.adversarial, data, settings, progress)
    train_by_bound(vae, case.estimator, data, settings, progress)
    if case.two_stage:
        second = TwoStageVAE(vae, hidden=(100,))
        train_by_bound(second, None, data, settings, progress)
        return second
    return vae


def train_by_bound(
    vae: VAE | TwoStageVAE,
    estimator: str | None,
    data: Dataset,
    settings: Settings,
    progress: bool,
) -> None:
    """Trains by the ELBO, or by another estimator's bound with 8 particles."""
    loss: ELBO = Trace_ELBO() if estimator is None else make_estimator(estimator, num_particles=8)
    fit(
        vae.model,
        vae.guide,
        data.train,
        loss=loss,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        evaluate_every=settings.epochs,
        seed=settings.seed,
        progress=progress,
    ).require_finished()


def train_by_critic(
    vae: VAE, asked: Adversarial, data: Dataset, settings: Settings, progress: bool
) -> VAE:
    """Trains the decoder by an f-divergence; then, for log p(x), the noise and a guide to it.

    A critic judges means of x, which carry no noise and go through a sigmoid: the scale of the
    likelihood and the guide are fitted afterwards, by the ELBO with the decoder held fixed.
    """
    generator = VAE(vae.data_dim, vae.latent_dim, settings.hidden, likelihood="bernoulli")
    fit_divergence(
        generator.model,
        data.train,
        divergence=asked.divergence,
        mean=True,
        noise=asked.noise,
        learning_rate=asked.learning_rate,
        critic_learning_rate=asked.critic_learning_rate,
        epochs=settings.adversarial_epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        evaluate_every=settings.adversarial_epochs,
        progress=progress,
    ).require_finished()
    vae.decoder = nn.Sequential(generator.decoder, nn.Sigmoid()).requires_grad_(False).eval()
    train_by_bound(vae, None, data, settings, progress)
    return vae


def measure(
    case: Case, data: Dataset, space: Features, settings: Settings, progress: bool
) -> Measured:
    """Trains a generator, draws from it and measures the draws."""
    fitting, likelihood = on_levels(data, case.likelihood)
    case = replace(case, likelihood=likelihood)
    started = time.perf_counter()
    generator = train(case, fitting, settings, progress)
    seconds = time.perf_counter() - started
    means, draws = (
        generator.sample(
            settings.num_samples, mean=mean, generator=torch.Generator().manual_seed(settings.seed)
        )
        for mean in (True, False)
    )
    quality = partial(
        sample_quality,
        train=data.train,
        test=data.test,
        features=space,
        image_shape=data.image_shape,
        seed=settings.seed,
    )
    evidence = log_evidence(
        generator.model,
        generator.guide,
        data.test,
        num_particles=settings.num_particles,
        seed=settings.seed,
        progress=progress,
    )
    return Measured(case, means, quality(means), quality(draws), evidence, seconds)


# --- tables and sentences -------------------------------------------------------------------------


def number(result: Result, name: str, digits: int = 2) -> str:
    """A number with its error."""
    return f"{float(result[name]):.{digits}f} ± {float(result[f'{name}_se']):.{digits}f}"


def row_of(measured: Measured) -> dict[str, str]:
    """The line of one generator in the table."""
    evidence = measured.evidence.quantity("log_evidence")
    return {
        "suspect": measured.case.suspect,
        "generator": measured.case.title,
        "log p(x) at least": f"{evidence.value:.2f}",
        "of": evidence.measure_text,
        "Frechet, means": number(measured.quality, "frechet_distance", 1),
        "Frechet, draws": number(measured.noisy, "frechet_distance", 1),
        "precision": number(measured.quality, "precision"),
        "recall": number(measured.quality, "recall"),
        "high freq., means": number(measured.quality, "high_frequency_ratio"),
        "high freq., draws": number(measured.noisy, "high_frequency_ratio"),
        "nearest distance": number(measured.quality, "nearest_distance_ratio"),
    }


def held_out_row(measured: Measured) -> dict[str, str]:
    """What held-out data get: what perfect samples would."""
    quality = measured.quality
    return {
        "suspect": "",
        "generator": "held-out data",
        "log p(x) at least": "",
        "of": "",
        "Frechet, means": number(quality, "frechet_distance_held_out", 1),
        "Frechet, draws": "",
        "precision": number(quality, "precision_held_out"),
        "recall": number(quality, "recall_held_out"),
        "high freq., means": number(quality, "high_frequency_ratio_held_out"),
        "high freq., draws": "",
        "nearest distance": "1",
    }


def published_rows() -> list[dict[str, str]]:
    """The published table."""
    return [dict(zip(("MNIST", "-log p(x) at most", "FID"), row, strict=True)) for row in PUBLISHED]


def spread(starts: Sequence[Measured]) -> float:
    """Standard deviation over trainings of the Frechet distance; 0 if there is only one."""
    values = torch.tensor([frechet(m) for m in starts], dtype=torch.float64)
    return float(values.std()) if len(values) > 1 else 0.0


def sharpness(measured: Measured) -> float:
    """Power of the means above the cutoff, over that of the training data."""
    return float(measured.quality["high_frequency_ratio"])


def frechet(measured: Measured) -> float:
    """Squared Frechet distance of the means to the training data."""
    return float(measured.quality["frechet_distance"])


def verdicts(found: Sequence[Measured], starts: Sequence[Measured]) -> list[str]:
    """A sentence for each suspect, then what they say together; all from the numbers."""
    base, luck = found[0], spread(starts)
    floor = float(base.quality["high_frequency_ratio_held_out"])
    sentences = [
        f"The base ({base.case.title}) has {sharpness(base):.2f} of the data's power at high "
        f"frequencies in its means and {float(base.noisy['high_frequency_ratio']):.2f} in its "
        f"draws (held-out data: {floor:.2f}); its Frechet distance is {frechet(base):.1f}, with a "
        f"standard deviation of {luck:.1f} over {len(starts)} trainings."
    ]
    helped: dict[str, float] = {}
    for suspect, words in SUSPECTS.items():
        own = [m for m in found if m.case.suspect == suspect]
        if not own:
            continue
        best = min(own, key=frechet)
        sharpest = max(own, key=sharpness)
        change = frechet(best) - frechet(base)
        errors = (float(m.quality["frechet_distance_se"]) for m in (base, best))
        error = math.hypot(*errors, math.sqrt(2) * luck)
        clear = "" if abs(change) > 2 * error else ", within its error,"
        if change < -2 * error:
            helped[suspect] = change
        worst = max(own, key=frechet)
        effect = f"changes the Frechet distance{clear} by {change:+.1f} ± {error:.1f}"
        if len(own) == 1:
            sentences.append(
                f"{words[0].upper()}{words[1:]}: {best.case.title} {effect}; high frequencies are "
                f"{sharpness(best):.2f} of the data's."
            )
            continue
        sentences.append(
            f"{words[0].upper()}{words[1:]}: the best here, {best.case.title}, {effect}, the "
            f"worst, {worst.case.title}, by {frechet(worst) - frechet(base):+.1f}; high "
            f"frequencies go from {min(map(sharpness, own)):.2f} to {sharpness(sharpest):.2f} "
            f"({sharpest.case.title})."
        )
    sentences += likelihood_and_pictures(found)
    if helped:
        culprit = min(helped, key=lambda name: helped[name])
        sentences.append(f"Largest improvement of the Frechet distance: {SUSPECTS[culprit]}.")
    elif len(found) > 1:
        sentences.append("No change improves the Frechet distance beyond its error.")
    return sentences


def likelihood_and_pictures(found: Sequence[Measured]) -> list[str]:
    """Whether the most probable held-out data and the best samples come from one generator.

    Numbers that live on another measure than the base's are not compared with it.
    """
    levels = {m.case.title: m.evidence.quantity("log_evidence") for m in found}
    measure = levels[found[0].case.title].measure
    alike = [m for m in found if levels[m.case.title].measure == measure]
    if len(alike) < 2:
        return []
    likely = alike[0]
    for m in alike[1:]:  # refuses what cannot be compared
        likely = m if levels[m.case.title] > levels[likely.case.title] else likely
    best, near = levels[likely.case.title], min(alike, key=frechet)
    others = [
        f"{title} ({level.measure_text})"
        for title, level in levels.items()
        if level.measure != measure
    ]
    source = "one generator" if likely is near else "different generators"
    return [
        f"The best held-out {best.measure_text} ({likely.case.title}, {best.value:.1f} nats) and "
        f"the best samples ({near.case.title}, Frechet {frechet(near):.1f} against "
        f"{frechet(likely):.1f}) come from {source}"
        + (f"; not compared with it: {', '.join(others)}." if others else ".")
    ]


# --- the whole ------------------------------------------------------------------------------------


def run(
    data: Dataset, out: Path, settings: Settings, say: Callable[[str], None], progress: bool
) -> Path:
    """Trains, measures, saves and draws everything; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    data = cut(data, settings)
    space = make_features(
        settings.features if data.train_labels is not None else "pca",
        data.train,
        data.train_labels,
        image_shape=data.image_shape,
        data_name=f"the {data.name} training images",
        seed=settings.seed,
    )
    say(f"feature space: {space.name}")
    starts = [
        measure(CASES[0], data, space, replace(settings, seed=settings.seed + i), progress)
        for i in range(settings.num_starts)
    ]
    save(starts[0], out)
    found = [starts[0]]
    say(f"{len(starts)} trainings of {BASE}: {sum(m.seconds for m in starts):.0f} s")
    for case in CASES[1:]:
        if settings.cases and case.title not in settings.cases:
            continue
        found.append(measure(case, data, space, settings, progress))
        save(found[-1], out)
        say(f"{case.title}: {found[-1].seconds:.0f} s")
    sections = describe(found, starts, data, space)
    for section in sections:
        say(f"\n## {section.title}\n{section.text}")
        for rows in section.tables:
            say(f"{as_text(rows)}\n")
        for note in section.notes:
            say(note)
    made = ", ".join(f"{name} {value}" for name, value in asdict(settings).items() if value != ())
    return save_sections(
        out, "What makes samples blurry", sections, made, "python -m analyses.blurry_samples"
    )


def cut(data: Dataset, settings: Settings) -> Dataset:
    """The first so many training and held-out images."""
    train, test = slice(settings.num_train), slice(settings.num_test)
    labels = data.train_labels, data.test_labels
    return replace(
        data,
        train=data.train[train],
        test=data.test[test],
        train_labels=None if labels[0] is None else labels[0][train],
        test_labels=None if labels[1] is None else labels[1][test],
    )


def save(measured: Measured, out: Path) -> None:
    """Writes the numbers of one generator."""
    name = "".join(c if c.isalnum() else "_" for c in measured.case.title.lower())
    measured.quality.save(out / f"{name}_means.nc")
    measured.noisy.save(out / f"{name}_draws.nc")
    measured.evidence.save(out / f"{name}_evidence.nc")


def describe(
    found: Sequence[Measured], starts: Sequence[Measured], data: Dataset, space: Features
) -> list[Section]:
    """Sections in the order of the page."""
    assert data.image_shape is not None
    rows = [row_of(m) for m in found]
    images = {"held-out data": data.test} | {m.case.title: m.means for m in found}
    spectra = {
        name: high_frequency_power(x, data.image_shape)
        for name, x in images.items()
        if name in ("held-out data", BASE) or name in extremes(found)
    }
    quality = found[0].quality
    return [
        Section(
            "verdict",
            "The verdict, from the numbers below",
            "",
            notes=tuple(verdicts(found, starts)),
        ),
        Section(
            "samples",
            f"Samples, {data.name}",
            "Means of x given z, with z drawn from the prior (or from the second stage). The first "
            "row is held-out data. " + pixels_text(data.pixels),
            figure=figure_of(
                plot_sample_rows(images, data.image_shape, data=data.name, pixels=data.pixels)
            ),
        ),
        Section(
            "table",
            "Every generator, one table",
            "Frechet distance (squared), precision and recall in the feature space named below; "
            "power above 0.25 cycles per pixel over that of the training data; distance to the "
            "nearest training image over that of held-out data. Log p(x) in nats per held-out "
            "image; densities of real values and probabilities of grey levels do not compare.",
            ([*rows, held_out_row(found[0])],),
            notes=tuple(quality.provenance["notes"]),
        ),
        Section(
            "likelihood_and_samples",
            "Likelihood against samples",
            "Held-out log density against the Frechet distance, of the generators whose likelihood "
            "is a density of real values.",
            figure=figure_of(plot_sharpness(scatter(found), data=data.name)),
        ),
        Section(
            "power",
            "Where the detail is lost",
            "Power spectra of means, beside that of held-out data.",
            figure=figure_of(plot_power(spectra, data=data.name)),
        ),
        Section(
            "published",
            "Published, on MNIST: the best likelihood has the worst pictures",
            "Rybkin, Daniilidis & Levine (2021), table 3, as read in the paper: the scale per "
            "pixel has the best likelihood by far and the worst pictures. Their FID is in the "
            f"Inception network's space, ours in another ({space.name}), so only the order "
            "compares.",
            (published_rows(),),
        ),
    ]


def figure_of(axes: Any) -> Figure:
    """The figure that axes are on."""
    assert isinstance(axes.figure, Figure)
    return axes.figure


def extremes(found: Sequence[Measured]) -> set[str]:
    """The blurriest and the sharpest generators."""
    ordered = sorted(found, key=sharpness)
    return {m.case.title for m in (*ordered[:2], *ordered[-2:])}


def scatter(found: Sequence[Measured]) -> dict[str, tuple[float, float, float]]:
    """Held-out log density, Frechet distance and its error by generator."""
    return {
        m.case.title: (
            m.evidence.quantity("log_evidence").value,
            frechet(m),
            float(m.quality["frechet_distance_se"]),
        )
        for m in found
        if m.evidence.quantity("log_evidence").measure == "real"
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(
        "blurry_samples",
        (__doc__ or "").rsplit("\n\n", 1)[0],
        data=("digits", "mnist", "fashion_mnist", "frey_face"),
        epilog="Frechet distances of other feature spaces, or of other numbers of samples, are\n"
        "not comparable; compare every generator with the row of held-out data.",
    )
    parser.add_argument("--epochs", type=int, help="of every training")
    parser.add_argument("--case", action="append", help="only this generator and the base; repeat")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis from the command line."""
    given = parse(arguments)
    settings = replace(TINY if given.tiny else Settings(), seed=given.seed)
    if given.epochs is not None:
        settings = replace(settings, epochs=given.epochs, adversarial_epochs=given.epochs)
    if given.case:
        unknown = sorted(set(given.case) - {case.title for case in CASES})
        if unknown:
            known = ", ".join(repr(case.title) for case in CASES)
            print(f"there is no generator {unknown[0]!r}; choose from {known}", file=sys.stderr)
            return 2
        settings = replace(settings, cases=(BASE, *given.case))
    say = partial(print, flush=True)

    def analysis(out: Path) -> Path:
        data = load_dataset(given.data, given.root)
        return run(data, out, settings, say, not given.no_progress)

    return run_on_one_thread(analysis, out_folder(given))


if __name__ == "__main__":
    sys.exit(main())
