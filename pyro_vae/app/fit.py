"""The command ``pyro-vae fit``: a run is begun, or gone on with."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_vae.app.terminal import DATA, EXIT_INTERRUPTED, Quiet, Root, Threads, import_slowly, say

if TYPE_CHECKING:
    from pyro_vae.inference.svi import Fit

__all__ = ["EPILOG", "fit"]

_BOUNDS = (
    "PathwiseELBO, AnalyticELBO, StickingTheLanding, ScoreFunction, LeaveOneOut, "
    "ImportanceWeighted, DReG, VIMCO, Renyi, RenyiDReG, ReweightedWakeSleep, WakeDReG, WakeSleep, "
    "PIWAE, MIWAE, CIWAE"
)
_OBJECTIVES = "BetaELBO, FreeBits, InfoVAE"
EPILOG = """\b
Examples:
  pyro-vae fit --data mnist
  pyro-vae fit --data digits --latent-dim 2 --hidden 200,100 --out results/small
  pyro-vae fit --data frey_face --likelihood discretized_logistic --network conv
  pyro-vae fit --data mnist --prior vamp:num_pseudo_inputs=500 --posterior iaf
  pyro-vae fit --data mnist --model two_layer --latent-dim 100 --hidden 200,200 --objective DReG
  pyro-vae fit --data digits --objective BetaELBO:beta=2
  pyro-vae fit --data digits --model denoising:level=0.2 --latent-dim 8
  pyro-vae fit --resume results/small --epochs 800

A part is NAME or NAME:KEY=VALUE,KEY=VALUE; a list is 16-32. What an argument is for, the class of
that name says: in Python, help(pyro_vae.models.VampPrior). What does not fit together is refused,
with what to do instead."""


def fit(
    data: Annotated[str | None, typer.Option(metavar="NAME", help=f"One of {DATA}.")] = None,
    model: Annotated[
        str,
        typer.Option(
            metavar="PART",
            help="vae; two_layer (a second layer of latents on top, with half of everything: "
            "upper_dim, upper_hidden); or an autoencoder, which has no bound but a MAP objective: "
            "undercomplete, sparse (strength), denoising (noise, level), contractive (strength).",
        ),
    ] = "vae",
    latent_dim: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of latents, or of codes.")
    ] = 20,
    hidden: Annotated[
        str,
        typer.Option(
            metavar="N,N,...",
            help="Units of the encoder's hidden layers; the decoder has them in reverse order.",
        ),
    ] = "400",
    likelihood: Annotated[
        str | None,
        typer.Option(
            metavar="PART",
            help="bernoulli (binary pixels); for grey ones continuous_bernoulli, gaussian (also "
            "real data; scale, min_scale), or probabilities of their grey levels: "
            "discretized_logistic (components, scale, min_scale) or categorical. Default: the one "
            "for the data; bernoulli for grey pixels, which are then binarised.",
        ),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            metavar="PART",
            help="Of the latents: normal, mixture (num_components), vamp (num_pseudo_inputs) or "
            "flow (kind, num_steps, hidden). Default: normal.",
        ),
    ] = None,
    posterior: Annotated[
        str | None,
        typer.Option(
            metavar="PART",
            help="The guide's family: diagonal, full, low_rank (rank) or iaf (num_steps, hidden, "
            "context_dim). Default: diagonal.",
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="PART",
            help="Of encoder and decoder: mlp, residual or conv (channels). Default: mlp.",
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="PART",
            help=f"What training maximises. A bound: {_BOUNDS}. No bound, and refused in a "
            f"comparison with one: {_OBJECTIVES} (BetaELBO:beta=4, FreeBits:nats=0.1,groups=site, "
            "InfoVAE:alpha=1,weight=10). Early stopping and evaluation look at the ELBO in any "
            "case. Default: the ELBO.",
        ),
    ] = None,
    num_particles: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Draws from the guide for each datum in a training step. Default: 1, or 8 for "
            "objectives that weigh draws against each other.",
        ),
    ] = None,
    binarize: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="How grey pixels become binary: dynamic (drawn anew for each mini-batch), static "
            "(drawn once), threshold (above 0.5) or none. Default: dynamic for a bernoulli "
            "likelihood on grey pixels, else none.",
        ),
    ] = None,
    activation: Annotated[
        str,
        typer.Option(metavar="NAME", help="tanh, relu, elu, gelu, silu, softplus or sigmoid."),
    ] = "tanh",
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Passes over the training data, in all if resumed. Default: about 10,000 steps' "
            "worth, 20 to 500.",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Stop after this many evaluations of the held-out bound without an improvement, "
            "and keep the best parameters; 0 never stops. Default: a tenth of all evaluations, at "
            "least 5.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Data in a mini-batch.")
    ] = 128,
    learning_rate: Annotated[float, typer.Option(metavar="X", help="Of Adam.")] = 1e-3,
    warmup_epochs: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Epochs over which the KL term's weight rises from 0 to 1."
        ),
    ] = 0,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seeds weights, shuffling and draws.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The run folder. Default: results/DATA-MODEL-LATENTS."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that the folder holds.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Go on with this run where it stopped, with its own settings; takes only "
            "--epochs, --data-root, --device, --threads and --quiet besides. Added to the whole "
            "command that started a run, it starts anew where none was written yet.",
        ),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch data files that are missing.")
    ] = False,
    data_root: Root = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu or cuda. Default: cpu.")
    ] = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Trains a VAE or an autoencoder on a data set and keeps it in a run folder.

    Every tenth training datum (or the data set's own validation part) is held out to stop in time;
    the test set is not looked at. Ctrl-C, SIGTERM and SIGHUP keep what was reached and exit with
    130, 143 and 129. Bounds are in nats per datum.
    """
    given = dict(locals())
    _check_resume(given)
    layers = _parse_hidden(hidden)
    import_slowly("pyro_vae.runs")
    _check_device(device)
    if data is not None:
        _begin(given | {"hidden": layers})
        return
    assert resume is not None
    from pyro_vae.runs import resume_run

    with _kept_in(resume):
        fitted = resume_run(
            resume,
            epochs=epochs,
            root=data_root,
            device=device,
            threads=threads,
            progress=not quiet,
        )
    _end_of_fit(fitted, resume)


def _begin(given: dict[str, Any]) -> None:
    """Begins the run that the options describe, or goes on with it."""
    from pyro_vae.data import describe_dataset
    from pyro_vae.inference.svi import holds_run
    from pyro_vae.models import (
        ModelSpec,
        choose_binarization,
        choose_likelihood,
        model_name,
        on_levels,
    )
    from pyro_vae.models.parts import part_text
    from pyro_vae.runs import RunSettings, load_training_data, start_run

    data, overwrite, resume = given["data"], given["overwrite"], given["resume"]
    given = given | _parse_parts(given)
    spec = ModelSpec(**{field.name: given[field.name] for field in fields(ModelSpec)})
    settings = RunSettings(**{field.name: given[field.name] for field in fields(RunSettings)})
    info = describe_dataset(data)
    how = given["binarize"] or choose_binarization(info.measure, spec.likelihood, info.pixels)
    how = None if how == "none" else how
    likelihood = choose_likelihood("binary" if how else info.measure, spec.likelihood, info.pixels)
    name = model_name(spec.model)
    usual = Path("results") / f"{data}-{name}-{spec.latent_dim}"
    folder = resume or given["out"] or usual
    if (found := holds_run(folder)) and not (overwrite or resume):
        raise ValueError(
            f"{folder} holds a run already (its {found}): go on with it (--resume {folder}), name "
            "another folder (--out), or replace it (--overwrite)"
        )
    dataset = load_training_data(
        data, given["data_root"], binarization=how, download=given["download"]
    )
    dataset, likelihood = on_levels(dataset, likelihood)
    given["likelihood"] = likelihood
    shape = "-".join(map(str, [dataset.train.shape[1], *spec.hidden, spec.latent_dim]))
    kind = {"vae": "VAE", "two_layer": "two-layer VAE"}.get(name, f"{name} autoencoder")
    chosen = [f"{part_text(given[k])} {k}" for k in _PARTS[1:] if given[k] is not None]
    say(f"{kind} {shape}, {', '.join(chosen)}, on {dataset}")
    with _kept_in(folder):
        fitted = start_run(
            folder,
            dataset,
            replace(spec, likelihood=likelihood),
            settings,
            overwrite=overwrite,
            resume=resume is not None,
            progress=not given["quiet"],
        )
    _end_of_fit(fitted, folder)


_PARTS = ("model", "likelihood", "prior", "posterior", "network", "objective")


def _parse_parts(given: dict[str, Any]) -> dict[str, Any]:
    from pyro_vae.models.parts import parse_part

    parts: dict[str, Any] = {}
    for name in _PARTS:
        try:
            parts[name] = None if given[name] is None else parse_part(given[name])
        except ValueError as error:
            raise ValueError(f"--{name}: {error}") from None
    return parts


_WITH_RESUME = {"resume", "epochs", "data_root", "device", "threads", "quiet"}


def _check_resume(given: dict[str, Any]) -> None:
    """Refuses what does not go with --resume, which may stand alone or beside a whole command."""
    resume, out = given["resume"], given["out"]
    if given["data"] is not None:
        if resume is not None and (given["overwrite"] or out not in (None, resume)):
            option = "--overwrite" if given["overwrite"] else f"--out {out}"
            raise ValueError(f"--resume {resume} goes on with that run: leave out {option}")
        return
    if resume is None:
        raise ValueError(f"name a data set, as in --data mnist; there are {DATA}")
    defaults = {name: p.default for name, p in inspect.signature(fit).parameters.items()}
    changed = [
        name
        for name, value in given.items()
        if name not in _WITH_RESUME and value != defaults[name]
    ]
    if changed:
        option = f"--{changed[0].replace('_', '-')}"
        raise ValueError(
            f"a resumed run keeps the settings it was begun with: leave out {option}, or repeat "
            "the whole command that started the run, with --data"
        )


def _parse_hidden(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(
            f"--hidden is {text!r}, but must be whole numbers with commas, as in 200,100"
        ) from None


def _check_device(device: str | None) -> None:
    if device is None:
        return
    import torch

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "torch finds no CUDA device here: leave out --device, or look at pyro-vae doctor"
        )


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Says where a training that a signal ended is kept."""
    try:
        yield
    except SystemExit:
        _say_how_to_go_on(folder)
        raise


def _say_how_to_go_on(folder: Path) -> None:
    from pyro_vae.inference.svi import holds_run

    if holds_run(folder) is None:
        say("ended before anything was trained: nothing was written.")
        return
    say(f"interrupted: what was reached is in {folder}; go on with")
    say(f"  pyro-vae fit --resume {folder}")


def _end_of_fit(fitted: "Fit", folder: Path) -> None:
    typer.echo(fitted.summary())
    if fitted.status == "interrupted":
        _say_how_to_go_on(folder)
        raise typer.Exit(EXIT_INTERRUPTED)
    history = fitted.history
    bounded = "bound" not in history or history["bound"].attrs["bound"] == "lower"
    following = "evaluate" if bounded else "report"  # a guide that is a point has no evidence
    typer.echo(f"kept in {folder}; next: pyro-vae {following} {folder}")
