"""The commands that measure a trained run, or fit a table: each prints, and writes a page."""

import json
import re
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_vae.app.terminal import Quiet, Root, RunFolder, Threads, command, import_slowly, say
from pyro_vae.app.terminal import set_threads as set_threads_of_torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from pyro_vae.app.pages import Part
    from pyro_vae.results import Result
    from pyro_vae.runs import Run

__all__ = ["AsJson", "OpenPage", "add_measure_commands", "json_text", "show_page"]

AsJson = Annotated[
    bool, typer.Option("--json", help="Print the numbers as JSON, and nothing else, on stdout.")
]
OpenPage = Annotated[bool, typer.Option("--open", help="Show the page in the browser.")]
NumData = Annotated[int, typer.Option(min=1, metavar="N", help="Only the first N test data.")]
Particles = Annotated[int, typer.Option(min=2, metavar="N", help="Draws for each datum.")]
SeedOption = Annotated[int, typer.Option(min=0, metavar="N", help="Seeds the draws.")]
METHODS = "importance, two_sided, annealed, bidirectional, bridge, quadrature, exact"


def add_measure_commands(app: typer.Typer) -> None:
    """Registers them."""
    for function, name, examples in (
        (evidence, "evidence", "evidence results/mnist-vae-20 --method annealed --num-data 20"),
        (gap, "gap", "gap results/demo/vae-2 --open"),
        (quality, "quality", "quality results/demo/vae-2 --num-data 200"),
        (estimators, "estimators", "estimators results/demo/vae-2"),
        (compare, "compare", "compare results/demo/vae-2 results/demo/vae-10"),
        (em, "em", "em faithful.csv --components 1..6 --open"),
    ):
        command(app, name, epilog=f"\b\nExample:\n  pyro-vae {examples}")(function)


def evidence(
    run: RunFolder,
    method: Annotated[str, typer.Option(metavar="NAME", help=f"One of {METHODS}.")] = "importance",
    num_data: NumData = 100,
    seed: SeedOption = 0,
    data_root: Root = None,
    threads: Threads = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
    open_page: OpenPage = False,
) -> None:
    """Estimates log p(x) of test data, by the method of your choice.

    Each method says what its number bounds: importance and annealed estimates are lower in
    expectation, bidirectional ones give an interval on simulated data, quadrature is exact for one
    or two latents. Writes RUN/evidence.nc and RUN/evidence.html.
    """

    def measure(loaded: "Run", x: "Tensor") -> "Result":
        from pyro_vae.diagnostics.evidence import log_evidence

        return log_evidence(
            loaded.model, loaded.guide, x, method=method, seed=seed, progress=not quiet
        )

    def figure(found: "Result") -> "Axes | None":
        from pyro_vae.plots import plot_evidence

        return plot_evidence(found) if "elbo" in found else None

    measured = _on_test_data(run, num_data, data_root, threads, measure)
    _deliver(measured, run, "evidence", figure, as_json, open_page)


def gap(
    run: RunFolder,
    num_data: NumData = 50,
    num_particles: Particles = 1000,
    seed: SeedOption = 0,
    data_root: Root = None,
    threads: Threads = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
    open_page: OpenPage = False,
) -> None:
    """Splits log p(x) - ELBO of test data into what the family and the encoder cost.

    The guide is refitted to each datum, in its own family and in richer ones. Writes RUN/gap.nc and
    RUN/gap.html.
    """

    def measure(loaded: "Run", x: "Tensor") -> "Result":
        from pyro_vae.diagnostics.gap import elbo_gap

        options: dict[str, Any] = {"num_particles": num_particles, "seed": seed}
        return elbo_gap(loaded.model, loaded.guide, x, progress=not quiet, **options)

    def figure(found: "Result") -> "Axes":
        from pyro_vae.plots import plot_gap

        return plot_gap(found)

    measured = _on_test_data(run, num_data, data_root, threads, measure)
    _deliver(measured, run, "gap", figure, as_json, open_page)


def quality(
    run: RunFolder,
    num_data: NumData = 100,
    num_particles: Particles = 1000,
    reference: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="hmc compares with draws of it, at some cost."),
    ] = None,
    seed: SeedOption = 0,
    data_root: Root = None,
    threads: Threads = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
    open_page: OpenPage = False,
) -> None:
    """Says for which test data the encoder's posterior can be trusted, and why not for the others.

    Writes RUN/quality.nc and RUN/quality.html.
    """

    def measure(loaded: "Run", x: "Tensor") -> "Result":
        from pyro_vae.diagnostics.posterior import posterior_quality

        options: dict[str, Any] = {"num_particles": num_particles, "seed": seed}
        options |= {"reference": reference, "progress": not quiet}
        return posterior_quality(loaded.model, loaded.guide, x, **options)

    def figure(found: "Result") -> "Axes":
        from pyro_vae.plots import plot_khat

        return plot_khat(found)

    measured = _on_test_data(run, num_data, data_root, threads, measure)
    _deliver(measured, run, "quality", figure, as_json, open_page)


def estimators(
    run: RunFolder,
    num_data: NumData = 50,
    seed: SeedOption = 0,
    data_root: Root = None,
    threads: Threads = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
    open_page: OpenPage = False,
) -> None:
    """Compares gradient estimators at the run's parameters, and says which to train with.

    Bias, noise and cost in runs of the programs, which are the same on every machine. Writes
    RUN/estimators.nc and RUN/estimators.html.
    """

    def measure(loaded: "Run", x: "Tensor") -> "Result":
        from pyro_vae.diagnostics.gradients import compare_estimators

        return compare_estimators(
            loaded.model, loaded.guide, x, num_particles=(1, 8), seed=seed, progress=not quiet
        )

    def figure(found: "Result") -> "Axes":
        from pyro_vae.plots import plot_estimator_cost

        return plot_estimator_cost(found)

    measured = _on_test_data(run, num_data, data_root, threads, measure)
    _deliver(measured, run, "estimators", figure, as_json, open_page)


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders.", show_default=False)
    ],
    num_data: NumData = 10_000,
    num_particles: Particles = 1000,
    seed: SeedOption = 0,
    data_root: Root = None,
    threads: Threads = 1,
    quiet: Quiet = False,
    out: Annotated[
        Path, typer.Option(metavar="FILE.html", help="The page.", show_default=True)
    ] = Path("comparison.html"),
    as_json: AsJson = False,
    open_page: OpenPage = False,
) -> None:
    """Measures runs on the same test data, and compares them pair by pair with the first.

    Differences are paired over the data, so they are surer than the numbers they are made of.
    """
    if len(runs) < 2:
        raise ValueError("compare takes two runs or more: pyro-vae compare RUN RUN")
    import_slowly("pyro_vae.app.report")
    set_threads_of_torch(threads or 1)
    from pyro_vae.app.pages import Heading, Paragraph, Verbatim
    from pyro_vae.app.report import comparison_rows, difference_sentences
    from pyro_vae.diagnostics.evidence import log_evidence
    from pyro_vae.runs import load_run, load_test_data
    from pyro_vae.text import rows_text

    loaded = [load_run(run) for run in runs]
    options: dict[str, Any] = {"num_particles": num_particles, "seed": seed}
    found = []
    for run in loaded:
        x = load_test_data(run, num_data, data_root)
        say(f"measuring {run.path} on {len(x)} test data")
        found.append(log_evidence(run.model, run.guide, x, progress=not quiet, **options))
    rows = comparison_rows(list(zip(loaded, found, strict=True)))
    sentences = difference_sentences(loaded, found)
    if as_json:
        several = {str(run): result.numbers() for run, result in zip(runs, found, strict=True)}
        typer.echo(json_text({"runs": several, "differences": sentences}))
    else:
        typer.echo("\n".join([rows_text(rows), "", *sentences]))
    parts: list[Part] = [Heading("Numbers"), Verbatim(rows_text(rows)), Heading("Differences")]
    show_page(
        f"{len(runs)} runs on the same test data",
        [*parts, *map(Paragraph, sentences)],
        out,
        open_page,
    )


def em(
    table: Annotated[
        Path, typer.Argument(metavar="FILE.csv", help="A header, then a row a datum, all numbers.")
    ],
    columns: Annotated[
        str | None, typer.Option(metavar="A,B", help="Columns to take. Default: all.")
    ] = None,
    components: Annotated[
        str, typer.Option(metavar="A..B", help="Numbers of components, such as 3 or 1..6.")
    ] = "1..6",
    covariance: Annotated[
        str, typer.Option(metavar="NAME", help="full, tied, diag or spherical.")
    ] = "full",
    num_restarts: Annotated[int, typer.Option(min=1, metavar="N", help="Starts of each fit.")] = 5,
    seed: SeedOption = 0,
    threads: Threads = 1,
    as_json: AsJson = False,
    open_page: OpenPage = False,
) -> None:
    """Fits Gaussian mixtures to a table by EM and by variational Bayes, and chooses their size.

    Prints the evidence, BIC and ICL of each number of components. Writes FILE.em.html with the
    parameters of the one that BIC chooses, and FILE.em.csv with the component of each row, from 1.
    """
    numbers = _numbers(components)
    import_slowly("pyro_vae.models")
    set_threads_of_torch(threads or 1)
    from pyro_vae.data import read_table
    from pyro_vae.inference.em import compare_num_components, fit_em
    from pyro_vae.models import GaussianMixture
    from pyro_vae.results import write_text

    names, x = read_table(table, columns.split(",") if columns else None)

    def make(number: int) -> GaussianMixture:
        return GaussianMixture(number, len(names), covariance=covariance).to(x)

    say(f"{len(x)} rows of {', '.join(names)}; {components} components")
    options: dict[str, Any] = {"num_restarts": num_restarts, "seed": seed}
    found = compare_num_components(make, x, numbers, **options)
    best = int(found.bic_evidence.idxmax())
    mixture = make(best)
    fitted = fit_em(mixture, x, on_singular="restart", progress=False, **options)
    typer.echo(json_text(found.numbers()) if as_json else f"{found!r}\n\n{fitted.summary()}")
    labels = table.with_suffix(".em.csv")
    rows = "\n".join(map(str, (mixture.predict(x) + 1).tolist()))
    write_text(labels, f"component\n{rows}\n")
    show_page(
        f"Mixtures of {table.name}",
        _mixture_parts(found, fitted, mixture, x, names),
        table.with_suffix(".em.html"),
        open_page,
    )


def _mixture_parts(
    found: "Result", fitted: Any, mixture: Any, x: "Tensor", columns: Sequence[str]
) -> list["Part"]:
    from pyro_vae.app.pages import Heading, Paragraph, Table, Verbatim
    from pyro_vae.plots import plot_mixture, plot_num_components

    parts: list[Part] = [
        Heading("How many components?"),
        *map(Paragraph, found.provenance["verdict"]),
    ]
    if found.sizes["num_components"] > 1:
        parts.append(_picture(plot_num_components(found)))
    parts.append(Verbatim(found.table()))
    parts += [Heading(f"{mixture.num_components} components"), Paragraph(fitted.summary())]
    weights, means = mixture.weights.detach().tolist(), mixture.locs.detach().tolist()
    rows = [
        [str(k), f"{weight:.3g}", *(f"{value:.4g}" for value in mean)]
        for k, (weight, mean) in enumerate(zip(weights, means, strict=True), 1)
    ]
    parts.append(Table(["component", "weight", *(f"mean of {name}" for name in columns)], rows))
    if len(columns) > 1:
        drawn = plot_mixture(mixture, x, names=list(columns))
        parts.append(_picture(drawn, "The first two columns; ellipses of one and two sds."))
    return parts


# --- what they share ------------------------------------------------------------------------------


def _on_test_data(
    folder: Path,
    num_data: int,
    root: Path | None,
    threads: int | None,
    measure: Callable[["Run", "Tensor"], "Result"],
) -> "Result":
    import_slowly("pyro_vae.runs")
    set_threads_of_torch(threads or 1)
    from pyro_vae.runs import load_run, load_test_data

    run = load_run(folder)
    x = load_test_data(run, num_data, root)
    say(f"measuring {folder} on {len(x)} of its test data (--num-data N takes more)")
    return measure(run, x)


def _deliver(
    found: "Result",
    run: Path,
    name: str,
    figure: Callable[["Result"], "Axes | None"],
    as_json: bool,
    open_page: bool,
) -> None:
    """Prints the numbers, keeps them beside the run, and writes the page."""
    kept = found.save(run / f"{name}.nc")
    typer.echo(json_text({"run": str(run), **found.numbers()}) if as_json else repr(found))
    say(f"each datum's numbers: {kept}")
    from pyro_vae.app.pages import Heading, Note, Paragraph, Verbatim

    told = found.provenance
    parts: list[Part] = [Paragraph(text) for text in told.get("verdict", [])]
    parts += [Heading("Numbers"), Verbatim(found.table())]
    if (drawn := figure(found)) is not None:
        parts += [Heading("Picture"), _picture(drawn)]
    parts += [Note(text) for text in told.get("notes", [])]
    parts += [Heading("Again"), Verbatim(f"pyro-vae {name} {run}")]
    show_page(f"{name.capitalize()} of {run.name}", parts, run / f"{name}.html", open_page)


def _picture(ax: "Axes", caption: str = "") -> "Part":
    from pyro_vae.app.pages import Picture

    figure: Any = ax.figure
    return Picture(figure, caption)


def show_page(title: str, parts: Sequence["Part"], path: Path, open_page: bool) -> None:
    """Writes a page, says where, and shows it if asked to."""
    from pyro_vae.app.pages import Page

    page = Page(title)
    page.add(*parts)
    say(f"page: {page.save(path)}")
    if open_page:
        webbrowser.open(path.resolve().as_uri())


def json_text(value: Any) -> str:
    """JSON that every reader takes: what is not finite is null."""
    return json.dumps(value, indent=2, allow_nan=False)


def _numbers(text: str) -> list[int]:
    """From `"3"` or `"1..6"`."""
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text.strip())
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"--components is {text!r}: give a number, or a range such as 1..6")
    return list(range(first, last + 1))
