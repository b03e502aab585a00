r"""What lies in a latent space: what codes hold, how to move among them, and what they serve.

Seven parts: the 2-D manifold, straight and shortest paths, attribute vectors, what each unit does,
how well codes serve a classifier, what they compress, and the two lines of code from an autoencoder
to a VAE. The sentence that opens each part is made from its numbers.

    python -m analyses.latent_space
"""

import argparse
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from analyses.command import make_parser, out_folder, run_on_one_thread
from analyses.latent_connection import connection_section, programs
from analyses.latent_geometry import (
    attributes_section,
    manifold_section,
    paths_section,
    units_section,
)
from analyses.latent_uses import OTHER, compression_section, features_section
from analyses.latent_work import KINDS, Settings, Work, make, train
from analyses.sections import Section, as_text, save_sections
from pyro_vae import VAE, Autoencoder, load_dataset
from pyro_vae.data import Dataset

LARGE = Settings(
    hidden=(200,), latent_dim=20, epochs=30, manifold_epochs=60, batch_size=128, learning_rate=1e-3
)
TINY = Settings(
    hidden=(5,),
    latent_dim=3,
    epochs=1,
    manifold_epochs=1,
    trainings=2,
    num_train=200,
    num_labelled=100,
    num_surgery=10,
    num_pairs=4,
    num_points=5,
    num_samples=20,
    num_bootstrap=10,
)


def prepare(data: Dataset, settings: Settings, progress: bool, say: Callable[[str], None]) -> Work:
    """Trains the models that several parts share."""
    x = data.train[: settings.num_train]
    started = time.perf_counter()
    models: dict[str, list[VAE | Autoencoder]] = {}
    for kind in (*KINDS, "VAE"):
        for i in range(settings.trainings):
            seeded = replace(settings, seed=settings.seed + i)
            module = make(kind, x, seeded)
            train(module, x, seeded, progress)
            models.setdefault(kind, []).append(module)
    small = replace(settings, latent_dim=2, epochs=settings.manifold_epochs)
    manifold = make("VAE", x, small)
    assert isinstance(manifold, VAE)
    train(manifold, x, small, progress)
    say(f"trained in {time.perf_counter() - started:.0f} s")
    return Work(data, x, settings, progress, models, manifold, {})


def run(
    data: Dataset,
    root: str | None,
    out: Path,
    settings: Settings,
    say: Callable[[str], None],
    progress: bool,
) -> Path:
    """Trains, measures, saves and draws everything; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    work = prepare(data, settings, progress, say)
    parts: tuple[Callable[[Work], Section], ...] = (
        manifold_section,
        paths_section,
        attributes_section,
        units_section,
        features_section,
        partial(compression_section, root=root),
        connection_section,
    )
    sections = []
    for part in parts:
        started = time.perf_counter()
        section = part(work)
        sections.append(section)
        say(f"\n## {section.title} ({time.perf_counter() - started:.0f} s)\n{section.text}\n")
        for rows in section.tables:
            say(f"{as_text(rows)}\n")
        for note in section.notes:
            say(note)
    for name, result in work.results.items():
        result.save(out / f"{name}.nc")
    made = work.results["units"].provenance
    return save_sections(
        out,
        f"The latent space of {data.name}",
        sections,
        f"pyro_vae {made['version']}, torch {made['torch']}, {made['created']}, {settings}, one "
        "thread. Below, the programs of the last part.",
        f"python -m analyses.latent_space --data {data.name}\n\n{inspect.getsource(programs)}",
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(
        "latent_space",
        (__doc__ or "").rsplit("\n\n", 1)[0],
        data=("digits", "mnist", "fashion_mnist", "frey_face"),
        epilog="It writes report.html (read this one), the figures as PNG, and the numbers as "
        "NetCDF,\nwhich pyro_vae.results.load_result reads.",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis from the command line."""
    given = parse(arguments)
    settings = Settings() if given.data == "digits" else LARGE
    settings = replace(TINY if given.tiny else settings, seed=given.seed)
    say = partial(print, flush=True)

    def analysis(out: Path) -> Path:
        data = load_dataset(given.data, given.root)
        if data.name in OTHER:  # needed at the end: missing files are told at once
            load_dataset(OTHER[data.name], given.root)
        return run(data, given.root, out, settings, say, not given.no_progress)

    return run_on_one_thread(analysis, out_folder(given))


if __name__ == "__main__":
    sys.exit(main())
