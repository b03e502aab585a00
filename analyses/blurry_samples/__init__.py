r"""What makes the samples of a VAE blurry? Five suspects, one decoder, the same data.

The likelihood family, the guide's family and the bound, the prior, the divergence that training
minimises, and the size of the code: one is changed at a time, the decoder network stays. Every
generator is measured in the same way (Frechet distance in a stated feature space, precision and
recall, power at high frequencies, copies of training images, held-out log p(x)), and so is
held-out data, which says what perfect samples would get.

    python -m analyses.blurry_samples
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from analyses.blurry_samples.generators import (
    BASE,
    CASES,
    TINY,
    Measured,
    Settings,
    measure,
)
from analyses.blurry_samples.verdict import (
    frechet,
    held_out_row,
    published_rows,
    row_of,
    sharpness,
    verdicts,
)
from analyses.command import Output, file_name, make_parser, run_analysis, unknown_case
from analyses.pages import figure_of
from pyro_vae import load_dataset
from pyro_vae.data import Dataset
from pyro_vae.extras.samples import high_frequency_power, make_features
from pyro_vae.plots import pixels_text, plot_power, plot_sample_rows, plot_sharpness


def run(data: Dataset, settings: Settings, out: Output) -> Path:
    """Trains, measures, saves and draws everything; returns the page's path."""
    data = cut(data, settings)
    space = make_features(
        settings.features if data.train_labels is not None else "pca",
        data.train,
        data.train_labels,
        image_shape=data.image_shape,
        data_name=f"the {data.name} training images",
        seed=settings.seed,
    )
    out.say(f"feature space: {space.name}")
    starts = [
        measure(CASES[0], data, space, replace(settings, seed=settings.seed + i), out.progress)
        for i in range(settings.num_starts)
    ]
    save(starts[0], out)
    found = [starts[0]]
    out.say(f"{len(starts)} trainings of {BASE}: {sum(m.seconds for m in starts):.0f} s")
    for case in CASES[1:]:
        if settings.cases and case.title not in settings.cases:
            continue
        found.append(measure(case, data, space, settings, out.progress))
        save(found[-1], out)
        out.say(f"{case.title}: {found[-1].seconds:.0f} s")
    return out.write_page(
        data=data.name,
        settings=settings,
        pixels=pixels_text(data.pixels),
        space=space.name,
        notes=found[0].quality.provenance["notes"],
        verdicts=verdicts(found, starts),
        generators=[*map(row_of, found), held_out_row(found[0])],
        published=published_rows(),
        **draw(found, data),
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


def save(measured: Measured, out: Output) -> None:
    """Writes the numbers of one generator."""
    name, evidence = file_name(measured.case.title.lower()), measured.evidence
    means, draws = measured.quality, measured.noisy
    out.save({f"{name}_means": means, f"{name}_draws": draws, f"{name}_evidence": evidence})


def draw(found: Sequence[Measured], data: Dataset) -> dict[str, Any]:
    """The figures by name."""
    assert data.image_shape is not None
    about: dict[str, Any] = {"data": data.name}
    images = {"held-out data": data.test} | {m.case.title: m.means for m in found}
    shown = {"held-out data", BASE, *extremes(found)}
    spectra = {
        name: high_frequency_power(x, data.image_shape)
        for name, x in images.items()
        if name in shown
    }
    samples = plot_sample_rows(images, data.image_shape, pixels=data.pixels, **about)
    return {
        "samples": figure_of(samples),
        "likelihood_and_samples": figure_of(plot_sharpness(scatter(found), **about)),
        "power": figure_of(plot_power(spectra, **about)),
    }


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis from the command line."""
    parser = make_parser(
        "blurry_samples",
        (__doc__ or "").rsplit("\n\n", 1)[0],
        data=("digits", "mnist", "fashion_mnist", "frey_face"),
        epilog="Frechet distances of other feature spaces, or of other numbers of samples, are\n"
        "not comparable; compare every generator with the row of held-out data.",
    )
    parser.add_argument("--epochs", type=int, help="of every training")
    parser.add_argument("--case", action="append", help="only this generator and the base; repeat")
    given = parser.parse_args(arguments)
    settings = replace(TINY if given.tiny else Settings(), seed=given.seed)
    if given.epochs is not None:
        settings = replace(settings, epochs=given.epochs, adversarial_epochs=given.epochs)
    if unknown_case(given.case, [case.title for case in CASES], "generator"):
        return 2
    if given.case:
        settings = replace(settings, cases=(BASE, *given.case))
    return run_analysis(lambda out: run(load_dataset(given.data, given.root), settings, out), given)
