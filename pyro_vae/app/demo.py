"""The demonstration: two VAEs on binarised digits, measured on the test set, with a report."""

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyro_vae.app.report import (
    comparison_rows,
    difference_sentences,
    run_figures,
    save_figures,
    write_report,
)
from pyro_vae.data import Seed, as_seed
from pyro_vae.models import ModelSpec
from pyro_vae.results import Result
from pyro_vae.runs import (
    Run,
    RunSettings,
    clear_run,
    evaluate_run,
    load_run,
    load_run_data,
    load_training_data,
    start_run,
)
from pyro_vae.text import rows_text

__all__ = ["Demo", "run_demo"]


@dataclass(frozen=True)
class Demo:
    """What the demonstration made.

    Attributes:
        runs: The runs, smallest latent first.
        evaluations: What was measured on the test set, in the order of the runs.
        report: The HTML page.
    """

    runs: tuple[Run, ...]
    evaluations: tuple[Result, ...]
    report: Path

    def table(self) -> str:
        """The runs side by side, in nats per datum of the test set, and how they differ."""
        heads = ("run", "model", "ELBO", "log evidence", "gap", "unreliable errors")
        evaluated = list(zip(self.runs, self.evaluations, strict=True))
        rows = [dict(zip(heads, row.values(), strict=True)) for row in comparison_rows(evaluated)]
        error = (
            "± is the standard error of the draws, for these test data; ? where it is unreliable "
            "for some of them, as many as the last column counts."
        )
        differences = difference_sentences(self.runs, self.evaluations)
        said = [textwrap.fill(text, 100) for text in (error, *differences)]
        return "\n".join([rows_text(rows), "", *said])


def run_demo(
    folder: str | os.PathLike[str] = "results/demo",
    *,
    latent_dims: Sequence[int] = (2, 10),
    hidden: Sequence[int] = (200, 100),
    epochs: int = 400,
    num_particles: int = 1000,
    seed: Seed = 0,
    threads: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Demo:
    """Trains a VAE for each latent dimension on digits, measures both, and writes a report.

    The digits are binarised dynamically. Runs that an earlier demonstration left in the folder are
    replaced.

    Args:
        folder: Where to write: a run folder for each model, and ``report.html``.
        latent_dims: Numbers of latents.
        hidden: Sizes of the hidden layers.
        epochs: At most so many passes; the held-out bound stops training earlier.
        num_particles: Draws for each test datum.
        seed: Seeds training and evaluation.
        threads: Of training, as for `fit`.
        progress: As for `fit`.
        say: Called with a line whenever something was done.

    Returns:
        The runs and what was measured.

    Raises:
        KeyboardInterrupt: If Ctrl-C ended a training; its run is kept, and no report is written.
    """
    seed = as_seed(seed)
    target = Path(folder)
    (target / "report.html").unlink(missing_ok=True)  # of runs that are about to go
    dataset = load_training_data("digits", binarization="dynamic")
    settings = RunSettings(
        learning_rate=3e-3, epochs=epochs, patience=40, seed=seed, threads=threads
    )
    runs: list[Run] = []
    evaluations: list[Result] = []
    for latent_dim in latent_dims:
        place = target / f"vae-{latent_dim}"
        clear_run(place)
        fitted = start_run(
            place,
            dataset,
            ModelSpec(latent_dim=latent_dim, hidden=hidden),
            settings,
            progress=progress,
        )
        say(f"{place}: {fitted.summary()}")
        fitted.require_finished()
        runs.append(load_run(place))
    for run in runs:
        say(f"{run.path}: measuring on the test set")
        evaluations.append(
            evaluate_run(run, num_particles=num_particles, seed=seed, progress=progress)
        )
        figures = run_figures(run, load_run_data(run), evaluations[-1])
        save_figures(figures, run.path / "figures")
    say("writing the report")
    report = write_report(
        runs, target / "report.html", title="Two autoencoders of handwritten digits"
    )
    return Demo(tuple(runs), tuple(evaluations), report)
