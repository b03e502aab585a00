r"""Can the posterior of a VAE be trusted, datum by datum, and what improves it?

A VAE with two latents and a diagonal guide is trained; then its decoder is held fixed, so that all
guides below are judged against one and the same posterior, which Hamiltonian Monte Carlo (HMC) and
a grid know. One thing is changed at a time: training time, the guide's family, the noise of
the gradients, the bound, the size of the encoder, the data it is trained on. Every guide gets its
k-hat, divergences, errors against HMC, a classifier two-sample test, and calibration under the
model's own data.

    python -m analyses.posterior_quality
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from analyses.command import Output, file_name, make_parser, run_analysis, unknown_case
from analyses.posterior_quality.figures import chosen_data, draw
from analyses.posterior_quality.verdict import Case, Measured, row_of, verdicts, worst_rows
from pyro_vae import VAE, fit, posterior_quality
from pyro_vae.data import Dataset
from pyro_vae.inference.estimators import make_estimator
from pyro_vae.inference.mcmc import PosteriorSample, sample_posterior
from pyro_vae.models.parts import mlp
from pyro_vae.runs import load_training_data


@dataclass(frozen=True)
class Settings:
    """How much is trained and measured; the defaults take about three minutes of one core.

    Attributes:
        hidden: Hidden units of the decoder, and in reverse of the encoder.
        large_hidden: Hidden units of the larger encoder.
        epochs: Of the first training, of model and guide.
        more_epochs: Of every further training, of the guide alone.
        training_particles: Draws of the guides that are trained with several.
        batch_size: Of the training.
        learning_rate: Of the training.
        num_train: At most so many training data.
        num_data: Held-out data whose posteriors are judged.
        num_particles: Draws of the guide for each datum.
        num_simulations: Data drawn from the model for the calibration.
        num_permutations: Behind p-values.
        num_chains: Chains of the reference for each datum.
        num_warmup: Steps of each chain that only adapt.
        num_samples: Draws kept of each chain.
        grid_steps: Points along each side of the grids.
        cases: Titles of the guides; all if empty.
        seed: Seeds everything.
    """

    hidden: tuple[int, ...] = (64,)
    large_hidden: tuple[int, ...] = (256, 256)
    epochs: int = 60
    more_epochs: int = 180
    training_particles: int = 8
    batch_size: int = 64
    learning_rate: float = 2e-3
    num_train: int = 5000
    num_data: int = 200
    num_particles: int = 1000
    num_simulations: int = 500
    num_permutations: int = 200
    num_chains: int = 8
    num_warmup: int = 200
    num_samples: int = 800
    grid_steps: int = 100
    cases: tuple[str, ...] = ()
    seed: int = 0


TINY = Settings(
    hidden=(5,),
    large_hidden=(6,),
    epochs=1,
    more_epochs=1,
    training_particles=2,
    num_train=150,
    num_data=12,
    num_particles=100,
    num_simulations=50,
    num_permutations=9,
    num_chains=2,
    num_warmup=20,
    num_samples=30,
    grid_steps=15,
    cases=("longer", "full covariance", "less noise", "importance-weighted", "larger encoder"),
)

CASES = (
    Case("longer", "base", "training the same encoder longer"),
    Case("full covariance", "longer", "a full covariance", posterior="full"),
    Case(
        "less noise",
        "longer",
        "gradients of less noise (more draws, and no score term)",
        estimator="StickingTheLanding",
    ),
    Case(
        "importance-weighted",
        "less noise",
        "the importance-weighted bound, with as many draws",
        estimator="DReG",
    ),
    Case("larger encoder", "longer", "a larger encoder", large=True),
    Case("model's data", "longer", "training on data that the model draws", simulated=True),
    Case(
        "all of these",
        "longer",
        "all of these together",
        posterior="full",
        estimator="DReG",
        large=True,
        simulated=True,
    ),
)
BASE = Case("base", "base", "the diagonal guide as it was trained with the model")


# --- training -------------------------------------------------------------------------------------


def train_base(x: Tensor, settings: Settings, progress: bool) -> VAE:
    """Trains model and guide together."""
    torch.manual_seed(settings.seed)
    vae = VAE(x.shape[1], 2, settings.hidden)
    train(vae, x, settings.epochs, None, settings, progress)
    return vae


def train_guide(case: Case, base: VAE, x: Tensor, settings: Settings, progress: bool) -> VAE:
    """Trains another guide to the base's decoder, which is held fixed.

    The guide starts from the base's encoder, unless its encoder has another size: then it is
    trained anew, for as many epochs as the others in all.
    """
    torch.manual_seed(settings.seed)
    vae = VAE(base.data_dim, 2, settings.hidden, posterior=case.posterior)
    vae.decoder = copy.deepcopy(base.decoder)
    epochs = settings.more_epochs
    if case.large:
        outputs = vae.posterior.num_parameters
        vae.encoder = mlp(base.data_dim, settings.large_hidden, outputs, base.activation)
        epochs += settings.epochs
    else:
        extend(vae.encoder, base.encoder)
    if case.simulated:  # ten times the data, a tenth of the epochs
        fresh = min(10, epochs)
        x = base.sample(
            fresh * len(x), mean=False, generator=torch.Generator().manual_seed(settings.seed)
        )
        epochs = max(epochs // fresh, 1)
    vae.decoder.requires_grad_(False)
    train(vae, x, epochs, case.estimator, settings, progress)
    vae.decoder.requires_grad_(True)
    return vae


@torch.no_grad()
def extend(encoder: torch.nn.Module, base: torch.nn.Module) -> None:
    """Copies an encoder into one that may have more outputs; these begin at zero.

    The outputs of a full covariance begin with those of a diagonal one, so both are then the same
    posterior.
    """
    for own, other in zip(encoder.parameters(), base.parameters(), strict=True):
        own.zero_()
        own[: len(other)] = other


def train(
    vae: VAE, x: Tensor, epochs: int, estimator: str | None, settings: Settings, progress: bool
) -> None:
    """Trains by the ELBO with one draw, or by another estimator with several."""
    fit(
        vae.model,
        vae.guide,
        x,
        loss=None if estimator is None else make_estimator(estimator, settings.training_particles),
        epochs=epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        evaluate_every=epochs,
        seed=settings.seed,
        progress=progress,
    ).require_finished()


# --- measuring ------------------------------------------------------------------------------------


def measure(
    case: Case,
    vae: VAE,
    x: Tensor,
    reference: PosteriorSample,
    seconds: float,
    settings: Settings,
    progress: bool,
) -> Measured:
    """The quality of one guide's posteriors."""
    quality = posterior_quality(
        vae.model,
        vae.guide,
        x,
        num_particles=settings.num_particles,
        reference=reference,
        checks=("stein", "classifier"),
        num_simulations=settings.num_simulations,
        num_permutations=settings.num_permutations,
        seed=settings.seed,
        progress=progress,
    )
    return Measured(case, vae, quality, seconds)


# --- the whole ------------------------------------------------------------------------------------


def run(data: Dataset, settings: Settings, out: Output) -> Path:
    """Trains, measures, saves and draws everything; returns the page's path."""
    training, x = data.train[: settings.num_train], data.test[: settings.num_data]
    started = time.perf_counter()
    base = train_base(training, settings, out.progress)
    seconds = time.perf_counter() - started
    with out.timed("reference"):
        reference = sample_posterior(
            base.model,
            x,
            num_chains=settings.num_chains,
            num_warmup=settings.num_warmup,
            num_samples=settings.num_samples,
            seed=settings.seed,
            progress=out.progress,
        )
        out.save({"reference": reference.result()})
    found: list[Measured] = []
    for case in (BASE, *CASES):
        if settings.cases and case.title not in ("base", *settings.cases):
            continue
        with out.timed(case.title):
            started = time.perf_counter()
            vae = (
                base if case is BASE else train_guide(case, base, training, settings, out.progress)
            )
            took = seconds if case is BASE else time.perf_counter() - started
            found.append(measure(case, vae, x, reference, took, settings, out.progress))
            out.save({file_name(case.title): found[-1].quality})
    quality = found[0].quality
    return out.write_page(
        settings=settings,
        verdicts=verdicts(found),
        guides=[row_of(m) for m in found],
        worst_datum=chosen_data(quality)["KL(q || p)"]["worst"],
        reasons=worst_rows(quality),
        notes=quality.provenance["notes"],
        **draw(found, data, x, reference, settings.grid_steps),
    )


# --- the command line -----------------------------------------------------------------------------


def with_compared(titles: Sequence[str]) -> set[str]:
    """Guides together with those that they are compared with, and so on."""
    against = {case.title: case.against for case in CASES}
    found = set(titles)
    while more := {against[title] for title in found if title in against} - found:
        found |= more
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis from the command line."""
    parser = make_parser(
        "posterior_quality",
        (__doc__ or "").rsplit("\n\n", 1)[0],
        data=("digits", "mnist"),
        epilog="k-hat says whether importance weights may be used, not whether the guide is\n"
        "right: read the columns of both. Calibration is about data from the model, on average.",
    )
    parser.add_argument(
        "--case", action="append", help="only this guide and what it is compared with; repeat"
    )
    given = parser.parse_args(arguments)
    settings = replace(TINY if given.tiny else Settings(), seed=given.seed)
    if unknown_case(given.case, [case.title for case in CASES], "guide"):
        return 2
    if given.case:
        settings = replace(settings, cases=tuple(sorted(with_compared(given.case))))

    def analysis(out: Output) -> Path:
        data = load_training_data(given.data, given.root, binarization="static")
        return run(data, settings, out)

    return run_analysis(analysis, given)
