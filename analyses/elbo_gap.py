r"""Why is the ELBO below log p(x): the guide's family, or its encoder?

The gap of each datum is split into an approximation part, which the best member of the guide's
family leaves, and an amortisation part, which the encoder loses against that member (Cremer, Li &
Duvenaud 2018). A VAE of digits is measured on training and test data, then again with other encoder
and decoder sizes, other guides and after other training times: what narrows which part?

    python -m analyses.elbo_gap
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analyses.command import Output, make_parser, run_analysis
from analyses.pages import figure_of
from pyro_vae import VAE, fit
from pyro_vae.data import Dataset
from pyro_vae.diagnostics.gap import GapOnBoth, elbo_surgery, gap_on_both
from pyro_vae.models.parts import mlp
from pyro_vae.plots import plot_gap, plot_widest_gaps
from pyro_vae.results import Result, paired_difference
from pyro_vae.runs import load_training_data


@dataclass(frozen=True)
class Setting:
    """One VAE: the hidden units of its encoder and of its decoder, its training and its guide."""

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    latent_dim: int
    epochs: int
    posterior: str = "diagonal"


@dataclass(frozen=True)
class Settings:
    """How much is trained and measured; the defaults take under five minutes on two cores.

    Attributes:
        base: The VAE in the middle, measured with the richer families too.
        encoders: Other encoders.
        decoders: Other decoders.
        epochs: Other training times.
        posteriors: Other guide families.
        batch_size: Of the training.
        learning_rate: Of the training.
        warmup_epochs: Epochs over which the KL term is switched on.
        activation: Of the hidden layers.
        num_data: Training data, and at most so many test data, whose gap is measured.
        num_particles: Fresh draws for each ELBO and datum.
        max_steps: Steps of each refit.
        seed: Seeds everything.
    """

    base: Setting = Setting((100,), (100,), 8, 150)
    encoders: tuple[tuple[int, ...], ...] = ((10,), (300, 300))
    decoders: tuple[tuple[int, ...], ...] = ((), (300, 300))
    epochs: tuple[int, ...] = (30, 600)
    posteriors: tuple[str, ...] = ("full", "iaf")
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_epochs: int = 0
    activation: str = "tanh"
    num_data: int = 200
    num_particles: int = 500
    max_steps: int = 600
    seed: int = 0


# The published encoder and decoder (784-200-200-(2x50), 50-200-200-784, ELU), trained a tenth as
# long; the gap of the first 1000 data.
FULL = Settings(
    base=Setting((200, 200), (200, 200), 50, 300),
    encoders=((500, 500),),
    decoders=((50,),),
    epochs=(30, 1000),
    batch_size=100,
    learning_rate=1e-3,
    warmup_epochs=40,
    activation="elu",
    num_data=1000,
    num_particles=5000,
    max_steps=3000,
)
TINY = Settings(
    base=Setting((5,), (5,), 2, 1),
    encoders=((3,),),
    decoders=(),
    epochs=(),
    posteriors=("full",),
    num_data=8,
    num_particles=10,
    max_steps=20,
)


def variants(settings: Settings) -> dict[str, Setting]:
    """The VAEs by what sets them apart from the first."""
    base = settings.base
    found = {"base": base}
    for hidden in settings.encoders:
        found[f"encoder {_units(hidden)}"] = replace(base, encoder=hidden)
    for hidden in settings.decoders:
        found[f"decoder {_units(hidden)}"] = replace(base, decoder=hidden)
    for epochs in settings.epochs:
        found[f"{epochs} epochs"] = replace(base, epochs=epochs)
    for posterior in settings.posteriors:
        found[f"guide {posterior}"] = replace(base, posterior=posterior)
    return found


def _units(hidden: Sequence[int]) -> str:
    return "-".join(map(str, hidden)) or "linear"


def train(data: Dataset, setting: Setting, settings: Settings, progress: bool) -> VAE:
    """Builds and trains one VAE."""
    torch.manual_seed(settings.seed)
    features = data.train.shape[1]
    vae = VAE(
        features,
        setting.latent_dim,
        setting.decoder[::-1],
        activation=settings.activation,
        posterior=setting.posterior,
    )
    outputs = vae.posterior.num_parameters
    vae.encoder = mlp(features, setting.encoder, outputs, settings.activation)
    fit(
        vae.model,
        vae.guide,
        data.train,
        epochs=setting.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_epochs=settings.warmup_epochs,
        evaluate_every=setting.epochs,
        seed=settings.seed,
        progress=progress,
    ).require_finished()
    return vae


def measure(
    vae: VAE, training: Tensor, test: Tensor, richer: Sequence[str], settings: Settings, bar: bool
) -> GapOnBoth:
    """The gap on training and test data."""
    return gap_on_both(
        vae.model,
        vae.guide,
        training,
        test,
        richer=richer,
        num_particles=settings.num_particles,
        max_steps=settings.max_steps,
        seed=settings.seed,
        progress=bar,
    )


# --- tables ---------------------------------------------------------------------------------------

LINES = {
    "log p(x)": "log_evidence",
    "ELBO of the best flow": "elbo_flow",
    "ELBO of the best full normal": "elbo_full",
    "ELBO of the best diagonal normal": "elbo_refitted",
    "ELBO of the encoder": "elbo",
    "approximation gap": "approximation_gap",
    "amortisation gap": "amortization_gap",
    "gap": "gap",
}


def number(result: Result, name: str) -> str:
    """The mean over the data with its Monte-Carlo error; ? where that is unreliable for some."""
    found = result.quantity(name)
    mark = "?" if found.num_unreliable else ""
    return f"{found.value:.3f} ± {found.standard_error or 0.0:.3f}{mark}"


def gap_rows(both: GapOnBoth) -> list[dict[str, str]]:
    """The whole gap decomposition of one VAE."""
    return [
        {
            "nats per datum": text,
            "training": number(both.training, name),
            "test": number(both.test, name),
        }
        for text, name in LINES.items()
        if name in both.training
    ]


def change(decomposition: Result, base: Result, name: str) -> str:
    """By how much a mean differs from the base's, with the standard error over the data, paired."""
    if decomposition is base:
        return "-"
    found = paired_difference(decomposition, base, name)
    return f"{found.value:+.2f} ± {found.data_standard_error or 0.0:.2f}"


def movement_rows(measured: Mapping[str, GapOnBoth]) -> list[dict[str, str]]:
    """The parts of the gap that move from one VAE to another."""
    rows = []
    base = measured["base"]
    for title, both in measured.items():
        for split, decomposition, first in (
            ("training", both.training, base.training),
            ("test", both.test, base.test),
        ):
            rows.append(
                {
                    "VAE": title,
                    "data": split,
                    "log p(x)": number(decomposition, "log_evidence"),
                    "ELBO": number(decomposition, "elbo"),
                    "minus base": change(decomposition, first, "elbo"),
                    "gap": number(decomposition, "gap"),
                    "gap minus base": change(decomposition, first, "gap"),
                    "approximation": number(decomposition, "approximation_gap"),
                    "amortisation": number(decomposition, "amortization_gap"),
                }
            )
    return rows


def generalisation_rows(measured: Mapping[str, GapOnBoth]) -> list[dict[str, str]]:
    """What the ELBO falls by from training to test data, and whose part it is."""
    parts = {
        "model: log p(x) falls": "model_generalization",
        "encoder: amortisation gap rises": "encoder_generalization",
        "family: approximation gap rises": "approximation_generalization",
    }
    return [
        {"VAE": title, **{text: number(both.summary, name) for text, name in parts.items()}}
        for title, both in measured.items()
    ]


# --- the whole ------------------------------------------------------------------------------------


def run(data: Dataset, settings: Settings, out: Output) -> Path:
    """Trains, measures, saves and draws everything; returns the page's path."""
    training, test = data.train[: settings.num_data], data.test[: settings.num_data]
    measured: dict[str, GapOnBoth] = {}
    surgery: Result | None = None
    for title, setting in variants(settings).items():
        with out.timed(title):
            vae = train(data, setting, settings, out.progress)
            richer = ("full", "flow") if title == "base" else ()
            both = measure(vae, training, test, richer, settings, out.progress)
            measured[title] = both
            name = title.replace(" ", "_")
            out.save({f"{name}_training": both.training, f"{name}_test": both.test})
            if surgery is None:
                surgery = elbo_surgery(vae.model, vae.guide, training, seed=settings.seed)
                out.save({"surgery": surgery})
    assert surgery is not None
    base = measured["base"]
    return out.write_page(
        data=data.name,
        settings=settings,
        surgery=surgery,
        surgery_table=surgery.drop_vars(["activity", "active_units", "unit"]).table(),
        created=base.training.provenance["created"],
        notes=base.test.provenance["notes"],
        decomposition=gap_rows(base),
        movements=movement_rows(measured),
        generalisation=generalisation_rows(measured),
        **draw(measured, test, data),
    )


def draw(measured: Mapping[str, GapOnBoth], test: Tensor, data: Dataset) -> dict[str, Any]:
    """The figures by name."""
    base = measured["base"]
    figures = {
        "gap": figure_of(plot_gap({"training": base.training, "test": base.test})),
        "movement": figure_of(plot_gap({n: both.test for n, both in measured.items()})),
    }
    if data.image_shape is not None:
        figures["widest"] = plot_widest_gaps(base.test, test, data.image_shape, pixels=data.pixels)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis from the command line."""
    given = make_parser(
        "elbo_gap",
        (__doc__ or "").rsplit("\n\n", 1)[0],
        data=("digits", "mnist", "fashion_mnist"),
        full="the published architecture; many CPU hours",
        epilog="A wide amortisation gap calls for a larger encoder or more training of it; a wide\n"
        "approximation gap for a richer guide family, and the gains say which one is worth it.\n"
        "An amortisation gap that is wide on test data alone is an encoder that overfits.",
    ).parse_args(arguments)
    settings = replace(TINY if given.tiny else FULL if given.full else Settings(), seed=given.seed)

    def analysis(out: Output) -> Path:
        data = load_training_data(given.data, given.root, binarization="static")
        return run(data, settings, out)

    return run_analysis(analysis, given)


if __name__ == "__main__":
    sys.exit(main())
