"""The command line, ``pyro-vae``. Nothing heavy is imported until a command runs."""

import functools
import inspect
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pyro_vae import __version__

if TYPE_CHECKING:
    from pyro_vae.inference.svi import Fit

__all__ = ["app", "main"]

_DATA = "digits, iris, mnist, fashion_mnist, binarized_mnist, omniglot, frey_face, faithful"
_BOUNDS = (
    "PathwiseELBO, AnalyticELBO, StickingTheLanding, ScoreFunction, LeaveOneOut, "
    "ImportanceWeighted, DReG, VIMCO, Renyi, RenyiDReG, ReweightedWakeSleep, WakeDReG, WakeSleep, "
    "PIWAE, MIWAE, CIWAE"
)
_OBJECTIVES = "BetaELBO, FreeBits, InfoVAE"
_EXIT_INTERRUPTED = 130
_EXIT_REFUSED = 2
_EXIT_FAULT = 1

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
    help="Variational autoencoders on Pyro, where every number says what it bounds.",
    epilog="""Examples:

\b
  pyro-vae demo                                 two models of digits, in a minute or two
  pyro-vae fit --data mnist                     the lecture's 784-400-20 on MNIST
  pyro-vae evaluate results/mnist-vae-20        ELBO, log evidence and gap on the test set
  pyro-vae report results/mnist-vae-20          one HTML page about it

\b
Errors are one line and exit with 2; --debug, after any command, shows where they come from.""",
)
data_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="What data sets there are and where they lie."
)
app.add_typer(data_app, name="data")

Command = TypeVar("Command", bound=Callable[..., None])

Root = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        metavar="FOLDER",
        help="Folder of the data files. Default: $PYRO_VAE_DATA, else the user's cache folder.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Processor threads for torch. More help large models on processors that nobody else "
        "uses; the number changes the last digits of a result.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No bars, and no lines of progress.")]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, as fit wrote it.", show_default=False)
]


def main() -> None:
    """Runs the command line."""
    app(prog_name="pyro-vae")


def _command(parent: typer.Typer, name: str, epilog: str) -> Callable[[Command], Command]:
    """Registers a command that speaks one line where it fails, and takes --debug."""

    def register(function: Command) -> Command:
        @functools.wraps(function)
        def guarded(*args: Any, debug: bool = False, **kwargs: Any) -> None:
            with _plain_errors(debug), _ended_by_signals(), _telling(kwargs):
                function(*args, **kwargs)

        option = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
        _add_parameter(guarded, function, "debug", option)
        parent.command(name, epilog=epilog)(guarded)
        return function

    return register


def _add_parameter(guarded: Any, function: Callable[..., Any], name: str, kind: Any) -> None:
    signature = inspect.signature(function)
    extra = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
    guarded.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])
    guarded.__annotations__ = {**function.__annotations__, name: kind}


@contextmanager
def _plain_errors(debug: bool) -> Iterator[None]:
    """One line on stderr instead of a traceback; warnings in one line as well."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
        try:
            yield
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            if debug:
                raise
            _say("interrupted: nothing more was written.")
            raise typer.Exit(_EXIT_INTERRUPTED) from None
        except (ValueError, RuntimeError, OSError, ImportError, MemoryError) as error:
            if debug:
                raise
            _say(f"error: {_one_line(error)}{_hint(error)}")
            raise typer.Exit(_EXIT_REFUSED) from None
        except Exception as error:
            if debug or type(error).__module__.startswith("typer"):
                raise
            _say(
                f"error: {type(error).__name__}: {_one_line(error)} (this is a fault of pyro_vae: "
                "run it again with --debug, and report what that shows)"
            )
            raise typer.Exit(_EXIT_FAULT) from None


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end a command as Ctrl-C does: no half file, and an exit status."""

    def end(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, n) for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)]
    ours = threading.current_thread() is threading.main_thread()
    # One that is ignored, as under nohup, stays ignored.
    taken = [n for n in numbers if ours and signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _telling(given: dict[str, Any]) -> Iterator[None]:
    """Shows what the package tells of its progress, unless asked not to."""
    from pyro_vae.progress import lines_on_stderr

    with nullcontext() if given.get("quiet") else lines_on_stderr():
        yield


def _import(module: str) -> None:
    """Imports what takes long, and says so."""
    if module not in sys.modules:
        from pyro_vae.progress import announced

        with announced("importing torch", _say):
            import_module(module)


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        typer.echo(line, err=True)


def _hint(error: BaseException) -> str:
    """What the command line calls the remedies that the library names."""
    if type(error).__name__ != "DatasetError":
        return ""
    return " (On the command line: pyro-vae data get NAME, or --data-root FOLDER.)"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _set_threads(threads: int) -> None:
    """What only the program may set, never the library."""
    import torch

    torch.set_num_threads(threads)
    _say(f"{threads} thread{'s' * (threads > 1)} (--threads N changes it)")


# --- demo, fit ------------------------------------------------------------------------------------


@_command(
    app,
    "demo",
    epilog="""\b
Example:
  pyro-vae demo && open results/demo/report.html""",
)
def demo(
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where to write; it is the demo's own.")
    ] = Path("results/demo"),
    threads: Threads = 1,
    quiet: Quiet = False,
) -> None:
    """Trains two VAEs on digits and reports on them.

    A model of binarised digits with 2 latents and one with 10. On the test set it prints the ELBO,
    the importance-weighted log evidence and the gap between them, in nats per datum. It needs no
    network and one to two minutes. Runs of an earlier demo in the folder are replaced.
    """
    _import("pyro_vae.app.demo")
    _set_threads(threads or 1)
    from pyro_vae.app.demo import run_demo
    from pyro_vae.inference.svi import holds_run

    earlier = [path for path in sorted(out.glob("vae-*")) if holds_run(path)]
    if earlier:
        _say(f"replacing the runs of an earlier demo: {', '.join(map(str, earlier))}")
    made = run_demo(out, threads=threads, progress=not quiet, say=_say)
    typer.echo("\nTest set, nats per datum; all three are lower bounds in expectation:\n")
    typer.echo(made.table())
    typer.echo(f"\nreport: {made.report}")


@_command(
    app,
    "fit",
    epilog="""\b
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
with what to do instead.""",
)
def fit(
    data: Annotated[str | None, typer.Option(metavar="NAME", help=f"One of {_DATA}.")] = None,
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
    _import("pyro_vae.runs")
    _check_device(device)
    if data is None:
        assert resume is not None
        _resume(resume, epochs, data_root, device, threads, not quiet)
        return
    from pyro_vae.data import describe_dataset
    from pyro_vae.inference.svi import holds_run
    from pyro_vae.models import choose_binarization, choose_likelihood, model_name, on_levels
    from pyro_vae.models.parts import part_text
    from pyro_vae.runs import load_training_data, start_run

    parts = _parse_parts(given)
    info = describe_dataset(data)
    how = binarize or choose_binarization(info.measure, parts["likelihood"], info.pixels)
    how = None if how == "none" else how
    parts["likelihood"] = choose_likelihood(
        "binary" if how else info.measure, parts["likelihood"], info.pixels
    )
    name = model_name(parts["model"])
    folder = resume or out or Path("results") / f"{data}-{name}-{latent_dim}"
    if (found := holds_run(folder)) and not (overwrite or resume):
        raise ValueError(
            f"{folder} holds a run already (its {found}): go on with it (--resume {folder}), name "
            "another folder (--out), or replace it (--overwrite)"
        )
    dataset = load_training_data(data, data_root, binarization=how, download=download)
    dataset, parts["likelihood"] = on_levels(dataset, parts["likelihood"])
    shape = "-".join(map(str, [dataset.train.shape[1], *layers, latent_dim]))
    kind = {"vae": "VAE", "two_layer": "two-layer VAE"}.get(name, f"{name} autoencoder")
    chosen = [f"{part_text(parts[k])} {k}" for k in _PARTS[1:] if parts[k] is not None]
    _say(f"{kind} {shape}, {', '.join(chosen)}, on {dataset}")
    with _kept_in(folder):
        fitted = start_run(
            folder,
            dataset,
            latent_dim=latent_dim,
            hidden=layers,
            activation=activation,
            num_particles=num_particles,
            batch_size=batch_size,
            epochs=epochs,
            patience=patience,
            learning_rate=learning_rate,
            warmup_epochs=warmup_epochs,
            seed=seed,
            device=device,
            threads=threads,
            overwrite=overwrite,
            resume=resume is not None,
            progress=not quiet,
            **parts,
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


def _resume(
    folder: Path,
    epochs: int | None,
    root: Path | None,
    device: str | None,
    threads: int | None,
    progress: bool,
) -> None:
    """Goes on with a run by itself."""
    from pyro_vae.runs import resume_run

    with _kept_in(folder):
        fitted = resume_run(
            folder, epochs=epochs, root=root, device=device, threads=threads, progress=progress
        )
    _end_of_fit(fitted, folder)


def _check_resume(given: dict[str, Any]) -> None:
    """Refuses what does not go with --resume, which may stand alone or beside a whole command."""
    resume, out = given["resume"], given["out"]
    if given["data"] is not None:
        if resume is not None and (given["overwrite"] or out not in (None, resume)):
            option = "--overwrite" if given["overwrite"] else f"--out {out}"
            raise ValueError(f"--resume {resume} goes on with that run: leave out {option}")
        return
    if resume is None:
        raise ValueError(f"name a data set, as in --data mnist; there are {_DATA}")
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
        _say("ended before anything was trained: nothing was written.")
        return
    _say(f"interrupted: what was reached is in {folder}; go on with")
    _say(f"  pyro-vae fit --resume {folder}")


def _end_of_fit(fitted: "Fit", folder: Path) -> None:
    typer.echo(fitted.summary())
    if fitted.status == "interrupted":
        _say_how_to_go_on(folder)
        raise typer.Exit(_EXIT_INTERRUPTED)
    history = fitted.history
    bounded = "bound" not in history or history["bound"].attrs["bound"] == "lower"
    following = "evaluate" if bounded else "report"  # a guide that is a point has no evidence
    typer.echo(f"kept in {folder}; next: pyro-vae {following} {folder}")


# --- evaluate, sample, report ---------------------------------------------------------------------


@_command(
    app,
    "evaluate",
    epilog="""\b
Examples:
  pyro-vae evaluate results/mnist-vae-20
  pyro-vae evaluate results/mnist-vae-20 --num-particles 5000 --num-data 1000""",
)
def evaluate(
    run: RunFolder,
    num_particles: Annotated[
        int, typer.Option(min=1, metavar="N", help="Draws from the guide for each datum.")
    ] = 1000,
    num_data: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Only the first N test data. Default: all."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seeds the draws.")] = 0,
    data_root: Root = None,
    threads: Threads = 1,
    quiet: Quiet = False,
) -> None:
    """Measures ELBO, log evidence and gap on the test set.

    The log evidence is importance-weighted, a lower bound in expectation like the ELBO. Prints
    means in nats per datum with their standard errors, and for how many data k-hat says that
    the error is unreliable. Every datum's numbers go to RUN/evaluation.nc (NetCDF, for xarray and
    ArviZ), in place of those of an earlier evaluation.
    """
    _import("pyro_vae.runs")
    _set_threads(threads or 1)
    from pyro_vae.runs import evaluate_run, load_run

    _say(f"measuring {run} on its test data, {num_particles} particles")
    found = evaluate_run(
        load_run(run),
        num_particles=num_particles,
        num_data=num_data,
        seed=seed,
        root=data_root,
        progress=not quiet,
    )
    typer.echo(repr(found))
    typer.echo(f"kept in {run / 'evaluation.nc'}; next: pyro-vae report {run}")


@_command(
    app,
    "sample",
    epilog="""\b
Example:
  pyro-vae sample results/mnist-vae-20 --num-images 100 --seed 1""",
)
def sample(
    run: RunFolder,
    num_images: Annotated[int, typer.Option(min=1, metavar="N", help="Draws from the prior.")] = 64,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seeds the draws.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Default: RUN/samples.png.")
    ] = None,
) -> None:
    """Draws images from the prior into a PNG file.

    A latent is drawn from the prior and decoded; shown is the mean of x, which is smoother than a
    draw of x would be.
    """
    _import("pyro_vae.app.report")
    from pyro_vae.app.report import RunFigure, save_figures
    from pyro_vae.plots import pixels_text, plot_samples
    from pyro_vae.runs import load_run

    loaded = load_run(run)
    if not hasattr(loaded.module, "sample"):
        raise ValueError(
            f"{run} is an {type(loaded.module).__name__.lower()}, which has no prior to draw from: "
            "train a VAE (--model vae), or look at its reconstructions in pyro-vae report"
        )
    about = loaded.config.get("data", {})
    shape, pixels = about.get("image_shape"), about.get("pixels", "ink")
    if not shape:
        raise ValueError(
            f"{run} was trained on {loaded.data_name}, which are not images: draw from it in "
            "Python, with load_run(RUN).module.sample(10)"
        )
    target = out if out is not None else run / "samples.png"
    if target.suffix != ".png":
        raise ValueError(f"--out is {target}, but a picture is written as PNG: name it FILE.png")
    ax: Any = plot_samples(
        loaded.module,
        shape,
        num_images=num_images,
        seed=seed,
        data=loaded.data_name,
        pixels=pixels,
    )
    (path,) = save_figures([RunFigure(target.stem, "", ax.figure)], target.parent)
    typer.echo(f"{num_images} draws in {path}")
    typer.echo(pixels_text(pixels))


@_command(
    app,
    "report",
    epilog="""\b
Examples:
  pyro-vae report results/mnist-vae-20
  pyro-vae report results/demo/vae-2 results/demo/vae-10 --out both.html""",
)
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Default, for one run: RUN/report.html."),
    ] = None,
    data_root: Root = None,
) -> None:
    """Writes one HTML page about one or more runs.

    Numbers, figures, what they mean, and how to reproduce them. The page holds everything it shows
    and needs no network. Evaluate the runs first.
    """
    if out is None and len(runs) > 1:
        raise ValueError("a report on several runs needs a file: --out FILE.html")
    _import("pyro_vae.app.report")
    from pyro_vae.app.report import write_report

    _say("drawing and writing the page")
    typer.echo(f"report: {write_report(runs, out, root=data_root)}")


# --- data -----------------------------------------------------------------------------------------


@_command(data_app, "list", epilog="\b\nExample:\n  pyro-vae data list")
def data_list(data_root: Root = None) -> None:
    """Lists the data sets, and whether their files are here."""
    _import("pyro_vae.data")
    from pyro_vae.data import check_dataset, dataset_names, describe_dataset

    rows = [("name", "train / validation / test", "datum", "measure", "here")]
    for name in dataset_names():
        info = describe_dataset(name)
        sizes = " / ".join(str(size) if size else "-" for size in info.sizes)
        shape = " x ".join(map(str, info.shape))
        rows.append((name, sizes, shape, info.measure, _state(check_dataset(name, data_root))))
    _echo_table(rows)


@_command(data_app, "get", epilog="\b\nExample:\n  pyro-vae data get mnist")
def data_get(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {_DATA}.")],
    data_root: Root = None,
) -> None:
    """Fetches the files of a data set that are missing, and checks them. Uses the network."""
    _import("pyro_vae.data")
    from pyro_vae.data import describe_dataset, load_dataset

    dataset = load_dataset(name, data_root, download=True)
    info = describe_dataset(name)
    typer.echo(f"{dataset}\nsource: {info.citation}\nlicence: {info.license}")


@_command(
    data_app, "check", epilog="\b\nExamples:\n  pyro-vae data check\n  pyro-vae data check mnist"
)
def data_check(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Default: all of them.")
    ] = None,
    data_root: Root = None,
) -> None:
    """Checks the files of data sets by size and sha256.

    Exits with 2 if a file of a data set that was named is missing, or any file is damaged.
    """
    _import("pyro_vae.data")
    from pyro_vae.data import check_dataset, dataset_names

    found = {name: check_dataset(name, data_root) for name in names or dataset_names()}
    rows = [("data set", "file", "state")]
    for name, files in found.items():
        rows += [(name, path, state) for path, state in files] or [
            (name, "-", "ok (comes with scikit-learn)")
        ]
    _echo_table(rows)
    allowed = {"ok"} if names else {"ok", "missing"}
    bad = sorted({n for n, files in found.items() for _, state in files if state not in allowed})
    if bad:
        raise ValueError(
            f"{', '.join(bad)}: missing or damaged files. Delete damaged ones, then run "
            f"pyro-vae data get {bad[0]}, or name the folder with --data-root"
        )


def _state(files: list[tuple[str, str]]) -> str:
    if not files:
        return "yes (comes with scikit-learn)"
    faults = sorted({state for _, state in files if state != "ok"})
    if not faults:
        return "yes"
    return "no" if faults == ["missing"] else f"damaged ({', '.join(faults)})"


def _echo_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


# --- doctor ---------------------------------------------------------------------------------------


@_command(app, "doctor", epilog="\b\nExample:\n  pyro-vae doctor")
def doctor(data_root: Root = None) -> None:
    """Describes this installation, to paste into a question.

    Versions, threads, BLAS, processor, data found, and whether torch and torchvision work together.
    """
    import platform
    import re
    from importlib.metadata import PackageNotFoundError, version

    _import("torch")
    import torch

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    names = ("pyro-ppl", "numpy", "scikit-learn", "xarray", "arviz", "matplotlib", "safetensors")
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    variables = [f"{n}={os.environ[n]}" for n in _THREAD_VARIABLES if n in os.environ]
    lines = {
        "pyro_vae": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__} (CUDA: {cuda})",
        "torchvision": _torchvision(installed("torchvision")),
        "others": ", ".join(f"{name} {installed(name)}" for name in names),
        "threads": f"{torch.get_num_threads()} of {_usable_cores()} cores"
        + (f" ({', '.join(variables)})" if variables else ""),
        "BLAS": f"{blas[1] if blas else 'unknown'}; MKL "
        f"{'yes' if torch.backends.mkl.is_available() else 'no'}, oneDNN "
        f"{'yes' if torch.backends.mkldnn.is_available() else 'no'}",
        "processor": _processor(torch.backends.cpu.get_cpu_capability()),
        "data": _data_here(data_root),
    }
    for name, text in lines.items():
        typer.echo(f"{name + ':':<13}{text}")


_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "sve")


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _torchvision(found: str) -> str:
    """Whether torchvision's compiled operators load into this torch."""
    import torch

    try:
        import torchvision

        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        torchvision.ops.nms(boxes, torch.ones(1), 0.5)
    except Exception as error:  # a wrong pair fails in many ways
        return (
            f"{found} does NOT match this torch ({_one_line(error)}): install both anew, as "
            "pyro-vae's requirements name them"
        )
    return f"{found}, matches torch (its compiled operators run)"


def _processor(capability: str) -> str:
    from pyro_vae.results import processor_name

    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    shown = " ".join(flag for flag in _FLAGS if flag in flags) or "flags unknown"
    return f"{processor_name()}; {shown}; torch uses {capability}"


def _data_here(root: Path | None) -> str:
    from pyro_vae.data import DatasetError, check_dataset, dataset_names

    given = "--data-root" if root is not None else "$PYRO_VAE_DATA"
    where = given if root is not None or os.environ.get("PYRO_VAE_DATA") else "the cache folder"
    try:
        states = {name: _state(check_dataset(name, root)) for name in dataset_names()}
    except DatasetError as error:
        return f"none: {_one_line(error)}"
    here = [name for name, state in states.items() if state.startswith("yes")]
    faulty = [f"{name} {state}" for name, state in states.items() if state.startswith("damaged")]
    missing = [name for name, state in states.items() if state == "no"]
    parts = [f"{', '.join(here)} (files in {where})", *faulty]
    return "; ".join([*parts, f"missing: {', '.join(missing)}"] if missing else parts)


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)
    ] = False,
) -> None:
    if show_version:
        typer.echo(f"pyro_vae {__version__}")
        raise typer.Exit
