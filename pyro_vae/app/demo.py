"""The demonstration: two VAEs on binarised digits, measured on the test set, with a report."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyro_vae.app.report import comparison_rows, run_figures, save_figures, write_report
from pyro_vae.results import Result
from pyro_vae.runs import (
    Run,
    clear_run,
    evaluate_run,
    load_run,
    load_run_data,
    load_training_data,
    start_run,
)

__all__ = ["Demo", "run_demo"]


@dataclass(frozen=True)
class Demo:
    """What the demonstration made.

    Attributes:
        runs: The runs, smallest latent first.
        evaluations: What was measured on the test set, in the order of the runs.
        report: The HTML page.
        interrupted: Whether Ctrl-C ended it early; then only the runs that were trained are there.
    """

    runs: tuple[Run, ...]
    evaluations: tuple[Result, ...]
    report: Path
    interrupted: bool = False

    def table(self) -> str:
        """The runs side by side, in nats per datum of the test set."""
        names = ("name", "model", "elbo", "log_evidence", "gap", "unreliable")
        heads = ("run", "model", "ELBO", "log evidence", "gap", "unreliable errors")
        evaluated = list(zip(self.runs, self.evaluations, strict=True))
        rows = [heads, *([row[name] for name in names] for row in comparison_rows(evaluated))]
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def run_demo(
    folder: str | os.PathLike[str] = "results/demo",
    *,
    latent_dims: Sequence[int] = (2, 10),
    hidden: Sequence[int] = (200, 100),
    epochs: int = 1000,
    num_particles: int = 1000,
    seed: int = 0,
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
        progress: Shows bars where stderr is a terminal.
        say: Called with a line whenever something was done.

    Returns:
        The runs and what was measured.
    """
    target = Path(folder)
    dataset = load_training_data("digits", binarization="dynamic")
    runs: list[Run] = []
    evaluations: list[Result] = []
    interrupted = False
    for latent_dim in latent_dims:
        place = target / f"vae-{latent_dim}"
        clear_run(place)
        fitted = start_run(
            place,
            dataset,
            latent_dim=latent_dim,
            hidden=hidden,
            learning_rate=3e-3,
            epochs=epochs,
            patience=40,
            seed=seed,
            progress=progress,
        )
        interrupted = fitted.status == "interrupted"
        say(f"{place}: {fitted.summary()}")
        runs.append(load_run(place))
        if interrupted:
            break
    for run in runs:
        evaluations.append(
            evaluate_run(run, num_particles=num_particles, seed=seed, progress=progress)
        )
        figures = run_figures(run, load_run_data(run), evaluations[-1])
        save_figures(figures, run.path / "figures")
    report = write_report(
        runs, target / "report.html", title="Two autoencoders of handwritten digits"
    )
    return Demo(tuple(runs), tuple(evaluations), report, interrupted)
