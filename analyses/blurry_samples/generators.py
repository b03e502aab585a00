"""The generators of `analyses.blurry_samples`: what sets each apart, its training, its numbers."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn

from pyro_vae import VAE, fit, log_evidence
from pyro_vae.data import Dataset
from pyro_vae.extras.f_divergence import fit_divergence
from pyro_vae.extras.samples import Features, sample_quality
from pyro_vae.inference.estimators import make_estimator
from pyro_vae.models import TwoStageVAE, on_levels
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
