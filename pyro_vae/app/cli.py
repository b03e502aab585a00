"""The command line, ``pyro-vae``. Nothing heavy is imported until a command runs."""

import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer

from pyro_vae import __version__
from pyro_vae.app.data_commands import data_app
from pyro_vae.app.doctor import doctor
from pyro_vae.app.fit import EPILOG, fit
from pyro_vae.app.measure_commands import AsJson, OpenPage, add_measure_commands, json_text
from pyro_vae.app.terminal import (
    Quiet,
    Root,
    RunFolder,
    Threads,
    command,
    import_slowly,
    say,
    set_threads,
)

__all__ = ["app", "main"]

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
  pyro-vae quality results/mnist-vae-20         can its posteriors be trusted?
  pyro-vae report results/mnist-vae-20          one HTML page about it

\b
Errors are one line and exit with 2; --debug, after any command, shows where they come from.""",
)


def main() -> None:
    """Runs the command line."""
    app(prog_name="pyro-vae")


@command(
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
    import_slowly("pyro_vae.app.demo")
    set_threads(threads or 1)
    from pyro_vae.app.demo import run_demo
    from pyro_vae.inference.svi import holds_run

    earlier = [path for path in sorted(out.glob("vae-*")) if holds_run(path)]
    if earlier:
        say(f"replacing the runs of an earlier demo: {', '.join(map(str, earlier))}")
    made = run_demo(out, threads=threads, progress=not quiet, say=say)
    typer.echo("\nTest set, nats per datum; all three are lower bounds in expectation:\n")
    typer.echo(made.table())
    typer.echo(f"\nreport: {made.report}")


command(app, "fit", epilog=EPILOG)(fit)


@command(
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
    as_json: AsJson = False,
) -> None:
    """Measures ELBO, log evidence and gap on the test set.

    The log evidence is importance-weighted, a lower bound in expectation like the ELBO. Prints
    means in nats per datum with their standard errors, and for how many data k-hat says that
    the error is unreliable. Every datum's numbers go to RUN/evaluation.nc (NetCDF, for xarray and
    ArviZ), in place of those of an earlier evaluation.
    """
    import_slowly("pyro_vae.runs")
    set_threads(threads or 1)
    from pyro_vae.runs import evaluate_run, load_run

    say(f"measuring {run} on its test data, {num_particles} particles")
    found = evaluate_run(
        load_run(run),
        num_particles=num_particles,
        num_data=num_data,
        seed=seed,
        root=data_root,
        progress=not quiet,
    )
    if as_json:
        typer.echo(json_text({"run": str(run), **found.numbers()}))
        return
    typer.echo(repr(found))
    typer.echo(f"kept in {run / 'evaluation.nc'}; next: pyro-vae report {run}")


@command(
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
    import_slowly("pyro_vae.app.report")
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


@command(
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
    open_page: OpenPage = False,
) -> None:
    """Writes one HTML page about one or more runs.

    Numbers, figures, what they mean, and how to reproduce them. The page holds everything it shows
    and needs no network. Evaluate the runs first.
    """
    if out is None and len(runs) > 1:
        raise ValueError("a report on several runs needs a file: --out FILE.html")
    import_slowly("pyro_vae.app.report")
    from pyro_vae.app.report import write_report

    say("drawing and writing the page")
    page = write_report(runs, out, root=data_root)
    typer.echo(f"report: {page}")
    if open_page:
        webbrowser.open(page.resolve().as_uri())


command(app, "doctor", epilog="\b\nExample:\n  pyro-vae doctor")(doctor)
add_measure_commands(app)
app.add_typer(data_app, name="data")


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)
    ] = False,
) -> None:
    if show_version:
        typer.echo(f"pyro_vae {__version__}")
        raise typer.Exit
