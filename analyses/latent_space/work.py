"""What the parts of the analysis of latent spaces share: settings, training, words for numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae import VAE, Autoencoder, fit
from pyro_vae.data import Dataset
from pyro_vae.extras.latents import feature_quality
from pyro_vae.inference.programs import Program
from pyro_vae.results import Result

Codes = Callable[[Tensor], Tensor]

GAUSSIAN = {"name": "gaussian", "scale": "shared"}
KINDS: dict[str, Any] = {
    "undercomplete": "undercomplete",
    "sparse": {"name": "sparse", "strength": 1.0},
    "denoising": {"name": "denoising", "noise": "mask", "level": 0.3},
    "contractive": {"name": "contractive", "strength": 0.1},
}


@dataclass(frozen=True)
class Settings:
    """How much is done; the defaults take about three minutes for embedded digits.

    Attributes:
        hidden: Hidden layers of every encoder; decoders mirror them.
        latent_dim: Numbers in a code, but for the manifold's 2.
        epochs: Of every training, but for the manifold's.
        manifold_epochs: Of the VAE with 2 latents.
        batch_size: Data in a mini-batch.
        learning_rate: Of Adam.
        trainings: Of each kind of code that is probed.
        num_train: The first so many training data are used, if there are more.
        num_labelled: The first so many of these are used by classifiers.
        num_surgery: Data whose posterior means give the activity.
        num_pairs: Pairs of codes that paths join.
        num_points: Points of a path.
        num_samples: Pictures drawn from each latent space.
        num_bootstrap: Resamples of the test data for the errors of classifiers.
        seed: Seeds everything.
    """

    hidden: tuple[int, ...] = (64,)
    latent_dim: int = 16
    epochs: int = 150
    manifold_epochs: int = 300
    batch_size: int = 64
    learning_rate: float = 2e-3
    trainings: int = 3
    num_train: int = 20_000
    num_labelled: int = 4_000
    num_surgery: int = 400
    num_pairs: int = 20
    num_points: int = 32
    num_samples: int = 1000
    num_bootstrap: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Work:
    """What the parts share: data, models trained on them, and what was measured so far."""

    data: Dataset
    x: Tensor
    settings: Settings
    progress: bool
    models: dict[str, list[VAE | Autoencoder]]
    manifold: VAE
    results: dict[str, Result]

    @property
    def test(self) -> Tensor:
        """Test data."""
        return self.data.test

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a picture."""
        assert self.data.image_shape is not None
        return self.data.image_shape

    @property
    def vae(self) -> VAE:
        """The first VAE of full size."""
        vae = self.models["VAE"][0]
        assert isinstance(vae, VAE)
        return vae


# --- training -------------------------------------------------------------------------------------


def train(module: VAE | Autoencoder, x: Tensor, settings: Settings, progress: bool) -> Any:
    """Trains a model in place; a VAE and an autoencoder alike."""
    return train_programs(module.model, module.guide, x, settings, progress)


def train_programs(
    model: Program, guide: Program, x: Tensor, settings: Settings, progress: bool
) -> Any:
    """The one training that everything here gets."""
    return fit(
        model,
        guide,
        x,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        evaluate_every=settings.epochs,
        seed=settings.seed,
        progress=progress,
    ).require_finished()


def make(kind: str, x: Tensor, settings: Settings) -> VAE | Autoencoder:
    """An untrained model of as many codes: "VAE" or one of `KINDS`."""
    torch.manual_seed(settings.seed)
    size, hidden = x.shape[1], settings.hidden
    if kind == "VAE":
        return VAE(size, settings.latent_dim, hidden, likelihood=GAUSSIAN)
    return Autoencoder(size, settings.latent_dim, hidden, KINDS[kind], likelihood=GAUSSIAN)


def codes_of(module: VAE | Autoencoder, x: Tensor) -> Tensor:
    """Codes without gradient; of a VAE the posterior means."""
    with torch.no_grad():
        found = module.encode(x)
        return found if isinstance(found, Tensor) else found.mean


# --- numbers in words -----------------------------------------------------------------------------


def percent(value: float, error: float | None = None) -> str:
    """A share in percent, with its standard error."""
    return f"{100 * value:.1f} %" if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"


def compared(difference: float, error: float, more: str, less: str, same: str) -> str:
    """Words for a difference: beyond two standard errors it has a sign."""
    if abs(difference) <= 2 * error:
        return same
    return more if difference > 0 else less


# --- classes --------------------------------------------------------------------------------------


def probe(work: Work, codes: Codes) -> tuple[float, float]:
    """The accuracy of a linear classifier of codes on test data, with its error."""
    x, labels = labelled(work)
    sets = [(codes(x), codes(work.test))]
    found = feature_quality(
        {"codes": sets},
        labels,
        work.data.test_labels,
        num_bootstrap=work.settings.num_bootstrap,
        seed=work.settings.seed,
    )
    return float(found["probe_accuracy"][0]), float(found["probe_accuracy_se"][0])


def labelled(work: Work) -> tuple[Tensor, Tensor]:
    """Spread evenly over the training data, for some sets are sorted by class."""
    assert work.data.train_labels is not None
    step = max(1, len(work.x) // work.settings.num_labelled)
    return work.x[::step], work.data.train_labels[: len(work.x)][::step]
