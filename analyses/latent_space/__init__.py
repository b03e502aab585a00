r"""What lies in a latent space: what codes hold, how to move among them, and what they serve.

Seven parts: the 2-D manifold, straight and shortest paths, attribute vectors, what each unit does,
how well codes serve a classifier, what they compress, and the two lines of code from an autoencoder
to a VAE. The sentence that opens each part is made from its numbers.

    python -m analyses.latent_space
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from analyses.command import Output, make_parser, run_analysis
from analyses.latent_space.connection import programs, tell_connection
from analyses.latent_space.geometry import tell_attributes, tell_manifold, tell_paths, tell_units
from analyses.latent_space.uses import OTHER, tell_compression, tell_features
from analyses.latent_space.work import KINDS, Settings, Work, make, train
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


def prepare(data: Dataset, settings: Settings, progress: bool) -> Work:
    """Trains the models that several parts share."""
    x = data.train[: settings.num_train]
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
    return Work(data, x, settings, progress, models, manifold, {})


def run(data: Dataset, root: str | None, settings: Settings, out: Output) -> Path:
    """Trains, measures, saves and draws everything; returns the page's path."""
    with out.timed("training"):
        work = prepare(data, settings, out.progress)
    parts: dict[str, Callable[[Work], dict[str, Any]]] = {
        "manifold": tell_manifold,
        "paths": tell_paths,
        "attributes": tell_attributes,
        "units": tell_units,
        "features": tell_features,
        "compression": partial(tell_compression, root=root),
        "connection": tell_connection,
    }
    told: dict[str, Any] = {}
    for name, part in parts.items():
        with out.timed(name):
            told |= part(work)
    out.save(work.results)
    return out.write_page(
        data=data.name,
        settings=settings,
        made=work.results["units"].provenance,
        command=f"python -m analyses.latent_space --data {data.name}\n\n"
        f"{inspect.getsource(programs)}",
        **told,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis from the command line."""
    given = make_parser(
        "latent_space",
        (__doc__ or "").rsplit("\n\n", 1)[0],
        data=("digits", "mnist", "fashion_mnist", "frey_face"),
        epilog="It writes report.html (read this one), the figures as PNG, and the numbers as "
        "NetCDF,\nwhich pyro_vae.results.load_result reads.",
    ).parse_args(arguments)
    settings = Settings() if given.data == "digits" else LARGE
    settings = replace(TINY if given.tiny else settings, seed=given.seed)

    def analysis(out: Output) -> Path:
        data = load_dataset(given.data, given.root)
        if data.name in OTHER:  # needed at the end: missing files are told at once
            load_dataset(OTHER[data.name], given.root)
        return run(data, given.root, settings, out)

    return run_analysis(analysis, given)
