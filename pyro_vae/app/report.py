"""One self-contained page about one or more runs, which a student can read offline."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pyro_vae.app.pages import figure_panels, figure_png, render_template
from pyro_vae.app.reproduce import PARTS, is_autoencoder, made_with, reproduce_commands
from pyro_vae.data import Dataset, DatasetError
from pyro_vae.inference.estimators import bounds_nothing, loss_text
from pyro_vae.models import VAE
from pyro_vae.models.parts import part_text
from pyro_vae.plots import (
    pixels_text,
    plot_bound,
    plot_evidence,
    plot_latent,
    plot_manifold,
    plot_reconstructions,
    plot_samples,
)
from pyro_vae.results import (
    IncomparableError,
    Quantity,
    Result,
    atomic_path,
    difference_text,
    paired_difference,
    write_text,
)
from pyro_vae.runs import CheckpointError, Run, load_evaluation, load_run, load_run_data

__all__ = [
    "RunFigure",
    "comparison_rows",
    "difference_sentences",
    "run_figures",
    "save_figures",
    "write_report",
]

_SHOWN = ("elbo", "log_evidence", "gap", "ess", "khat")
_KINDS = {"lower": "lower bound", "upper": "upper bound", "none": ""}
_MEASURES = {
    "binary": "The data are binary pixels, so the numbers are log probabilities and at most 0.",
    "grey": "The data are grey pixels in [0, 1], so the numbers are log densities and may be "
    "positive; they do not compare with those of binary pixels.",
    "counts": "The data are grey levels on a grid, so the numbers are log probabilities and at "
    "most 0; they do not compare with densities of the same pixels.",
    "real": "The data are real numbers in their own units, so the numbers are log densities: they "
    "change when the data are rescaled.",
}
_UNKNOWN_MEASURE = (
    "What the data are decides whether they are log probabilities or log densities; the two do not "
    "compare."
)


_NO_EVIDENCE = (
    "An autoencoder's guide is a point, which has no density: it is trained on a MAP objective, "
    "and neither an ELBO nor an evidence estimate exists for it."
)
_BOUND_WHILE_TRAINING = (
    "The ELBO during training, whichever objective was maximised. The band between the thin line "
    "(reconstruction) and the thick one (ELBO) is the KL term."
)
_MAP_WHILE_TRAINING = (
    "The MAP objective while training: log p(x | code) less the penalty, no bound."
)


@dataclass(frozen=True)
class RunFigure:
    """A figure with what to say about it.

    Attributes:
        name: For its file, such as "bound".
        caption: One or two sentences.
        figure: The figure.
    """

    name: str
    caption: str
    figure: Figure


def write_report(
    runs: Run | str | os.PathLike[str] | Sequence[Run | str | os.PathLike[str]],
    path: str | os.PathLike[str] | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
    title: str | None = None,
) -> Path:
    """Writes a self-contained HTML page: numbers, figures, what they mean, how to reproduce them.

    Numbers are those of the last `evaluate_run`; where there are none, or the weights have changed
    since, the page says so. Where the data are missing, so are the figures that need them.

    Args:
        runs: A run or its folder, or several.
        path: The file; None for ``report.html`` in the folder of the one run.
        root: Folder of the data files, as for `load_dataset`.
        title: Of the page; None to make one.

    Returns:
        The path.

    Raises:
        CheckpointError: If a run cannot be loaded.
        ValueError: If there is no run, several runs come without a path, or evaluation.nc is
            damaged.
        FileNotFoundError: If the folder of `path` is missing.
    """
    given = [runs] if isinstance(runs, Run | str | os.PathLike) else list(runs)
    loaded = [run if isinstance(run, Run) else load_run(run) for run in given]
    if not loaded:
        raise ValueError("there is no run to report on: pass one")
    if path is None and len(loaded) > 1:
        raise ValueError("a report on several runs lies in no run's folder: pass path=FILE.html")
    target = Path(path) if path is not None else loaded[0].path / "report.html"
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} does not exist: make it first")
    if title is None:
        names = list(dict.fromkeys(run.data_name for run in loaded))
        title = (
            f"{_model_text(loaded[0])} on {names[0]}"
            if len(loaded) == 1
            else f"{len(loaded)} models of {' and '.join(names)}"
        )
    evaluations = [load_evaluation(run) for run in loaded]
    measures = [run.config.get("data", {}).get("measure") for run in loaded]
    sections = [_section(run, found, root) for run, found in zip(loaded, evaluations, strict=True)]
    page = render_template(
        "report.html.j2",
        title=title,
        compared=comparison_rows(
            [(r, e) for r, e in zip(loaded, evaluations, strict=True) if e is not None]
        ),
        differences=difference_sentences(loaded, evaluations),
        bounded=not all(map(is_autoencoder, loaded)),
        points=any(map(is_autoencoder, loaded)),
        measure_text=" ".join(dict.fromkeys(_MEASURES.get(m, _UNKNOWN_MEASURE) for m in measures)),
        shared=_take_shared_notes(sections),
        runs=sections,
    )
    write_text(target, page)
    return target


# --- numbers --------------------------------------------------------------------------------------


def comparison_rows(evaluated: Sequence[tuple[Run, Result]]) -> list[dict[str, str]]:
    """A row for each run: `name`, `model`, `elbo`, `log_evidence`, `gap` and `unreliable`, as text.

    Args:
        evaluated: Runs with what `evaluate_run` found.
    """
    rows = []
    for run, found in evaluated:
        row = {"name": run.path.name, "model": _model_text(run)}
        for name in ("elbo", "log_evidence", "gap"):
            value, error = _rounded(found.quantity(name))
            row[name] = f"{value} ± {error}" if error else value
        bad = found.quantity("log_evidence").num_unreliable
        row["unreliable"] = f"{bad} of {found.sizes['datum']} data"
        rows.append(row)
    return rows


def difference_sentences(runs: Sequence[Run], evaluations: Sequence[Result | None]) -> list[str]:
    """Each run against the first, paired over the data, as sentences.

    Args:
        runs: The runs.
        evaluations: What `evaluate_run` found of each; None where it was not called.
    """
    found = [(run, e) for run, e in zip(runs, evaluations, strict=True) if e is not None]
    sentences = []
    for run, other in found[1:]:
        first, reference = found[0]
        for name in ("elbo", "log_evidence"):
            try:
                difference = paired_difference(other, reference, name)
            except IncomparableError as error:
                sentences.append(f"{run.path.name} against {first.path.name}: {error}")
                break
            label = {"elbo": "ELBO", "log_evidence": "log evidence"}[name]
            sentences.append(
                f"{label}: {run.path.name} minus {first.path.name} is "
                f"{difference_text(difference)}. It compares two lower bounds of one training "
                "each: training seeds are not in it."
            )
    return sentences


def _rounded(quantity: Quantity) -> tuple[str, str]:
    """The value and its standard error as text, to the second digit of the error."""
    error = quantity.standard_error
    if error is None or not math.isfinite(error) or error <= 0:
        return f"{quantity.value:.3f}", ""
    digits = min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{quantity.value:.{digits}f}", f"{error:.{digits}f}" + "?" * bool(
        quantity.num_unreliable
    )


def _model_text(run: Run) -> str:
    config = run.config["model"]["arguments"]
    name = type(run.module).__name__
    hidden, top = config.get("hidden", ()), config.get("latent_dim", config.get("code_dim"))
    layers = [config.get("data_dim"), *hidden, top]
    if name == "TwoLayerVAE":
        lower, upper = config["latent_dims"]
        layers = [config["data_dim"], *hidden[0], lower, *hidden[1], upper]
    kind = f"{config['kind']['name']} " if is_autoencoder(run) else ""
    return f"{kind}{name} {'-'.join(str(n) for n in layers)}"


def _table(found: Result) -> list[dict[str, str]]:
    rows = []
    for name in _SHOWN:
        quantity = found.quantity(name)
        value, error = _rounded(quantity)
        spread = quantity.data_standard_error
        particles = quantity.num_particles
        unit = "" if quantity.unit == "none" else quantity.unit
        rows.append(
            {
                "name": {"khat": "k-hat", "elbo": "ELBO"}.get(name, name.replace("_", " ")),
                "value": value,
                "error": error,
                "spread": "" if spread is None else f"{spread:.2g}",
                "unit": f"{unit} {quantity.reduction}" if unit == "nats" else unit,
                "kind": _KINDS.get(quantity.bound, quantity.bound),
                "particles": "" if particles is None else f"{particles:,}",
                "data": f"{quantity.num_data} {quantity.measure or ''}".strip(),
            }
        )
    return rows


# --- one run --------------------------------------------------------------------------------------


def _section(run: Run, found: Result | None, root: str | os.PathLike[str] | None) -> dict[str, Any]:
    dataset, notes = None, []
    try:
        dataset = load_run_data(run, root)
    except (DatasetError, CheckpointError, ValueError) as error:
        notes.append(f"Figures that show data are left out: {error}")
    if is_autoencoder(run):
        notes.insert(0, _NO_EVIDENCE)
    elif found is None:
        stale = (run.path / "evaluation.nc").exists()
        why = "the weights have changed since its evaluation" if stale else "it was not evaluated"
        again = " again" if stale else ""
        notes.insert(
            0,
            f"There are no numbers on test data for this run: {why}. Run pyro-vae evaluate "
            f"{run.path}, then this report{again}.",
        )
    lines = found.summary().splitlines() if found is not None else []
    said = [line.removeprefix("Note: ") for line in lines if line.startswith("Note: ")]
    return {
        "name": run.path.name,
        "sentence": _sentence(run),
        "rows": _table(found) if found is not None else [],
        "sentences": [line for line in lines if not line.startswith("Note: ")],
        "notes": said + notes,
        "figures": [
            {"caption": shown.caption, "panels": figure_panels(shown.figure)}
            for shown in run_figures(run, dataset, found)
        ],
        "commands": reproduce_commands(run, found),
        "made_with": made_with(run, found),
        "config": json.dumps(run.config, indent=2),
    }


def _take_shared_notes(sections: Sequence[dict[str, Any]]) -> list[str]:
    """Takes notes that several runs have out of their sections; each once, with the runs' names."""
    names: dict[str, list[str]] = {}
    for section in sections:
        for note in section["notes"]:
            names.setdefault(note, []).append(section["name"])
    shared = {note: of for note, of in names.items() if len(of) > 1}
    for section in sections:
        section["notes"] = [note for note in section["notes"] if note not in shared]
    return [f"{', '.join(of)}: {note}" for note, of in shared.items()]


def _sentence(run: Run) -> str:
    count = sum(parameter.numel() for parameter in run.module.parameters())
    data = run.config.get("data", {})
    how = f", binarised ({data['binarization']})" if data.get("binarization") else ""
    trained = run.config.get("fit", {})
    text = f"{_model_text(run)}, {count:,} parameters, on {run.data_name}{how}. "
    arguments = run.config["model"]["arguments"]
    parts = [f"{name} {part_text(arguments[name])}" for name in PARTS if name in arguments]
    if parts:
        text += f"Parts: {'; '.join(parts)}. "
    if not run.history.sizes.get("epoch"):
        return text + "Not one epoch has ended yet."
    text += (
        f"Trained for {int(run.history.epoch[-1])} epochs on {trained.get('num_data', '?')} data "
        f"({_objective_text(run)}, {trained.get('optimizer')}, batches of "
        f"{trained.get('batch_size')}, seed {trained.get('seed')}) in "
        f"{float(run.history.seconds[-1]):.0f} s."
    )
    if "validation_bound" in run.history:
        looks = run.history["validation_bound"].values
        best = int(looks.argmax())
        kept = ", whose parameters are kept" if trained.get("patience") else ""
        what = "MAP objective" if is_autoencoder(run) else "bound"
        text += (
            f" The held-out {what} was best, {looks[best]:.2f} nats per datum, after epoch "
            f"{int(run.history.epoch[best])}{kept}. The held-out data are "
            f"{data.get('held_out', 'a part of the training data')}; the test data were not used."
        )
    return text


def _objective_text(run: Run) -> str:
    """What training maximised, and whether that is a bound."""
    trained = run.config.get("fit", {})
    if is_autoencoder(run):
        return "MAP objective, no bound"
    particles = trained.get("num_particles") or 1
    text = loss_text(trained) + (f", {particles} particles" if particles > 1 else "")
    none = bounds_nothing(trained.get("loss", ""))
    return f"{text}, an objective that is not a bound" if none else text


def run_figures(
    run: Run, dataset: Dataset | None = None, evaluation: Result | None = None
) -> list[RunFigure]:
    """Every figure that can be drawn of a run, with captions.

    Args:
        run: The run.
        dataset: Its data, from `load_run_data`; without them, figures of data are left out.
        evaluation: What `evaluate_run` found; without it, that figure is left out.
    """
    figures: list[RunFigure] = []

    def add(name: str, ax: Any, caption: str) -> None:
        figures.append(RunFigure(name, caption, ax.figure))

    data, module = run.data_name, run.module
    if run.history.sizes.get("epoch") and "bound" in run.history:
        add(
            "bound",
            plot_bound(run.history, data=data),
            (_MAP_WHILE_TRAINING if is_autoencoder(run) else _BOUND_WHILE_TRAINING)
            + " Held-out data that fall behind training data show overfitting.",
        )
    if evaluation is not None:
        add(
            "evidence",
            plot_evidence(evaluation, data=data),
            "How far the evidence of each test datum lies above its ELBO: the height above the "
            "diagonal estimates KL(q(z | x) || p(z | x)). Triangles: its error is unreliable.",
        )
    about = run.config.get("data", {})
    shape, pixels = about.get("image_shape"), about.get("pixels", "ink")
    test = dataset.test if dataset is not None and len(dataset.test) else None
    if test is not None:
        test = test.to(next(module.parameters()))
    if shape and test is not None and hasattr(module, "reconstruct"):
        add(
            "reconstructions",
            plot_reconstructions(module, test, shape, data=data, pixels=pixels),
            "Test data, and what is left of them after passing through the latents. "
            + pixels_text(pixels),
        )
    if test is not None and dataset is not None and hasattr(module, "encode"):
        add(
            "latent",
            plot_latent(
                module, test, dataset.test_labels, label_names=dataset.label_names, data=data
            ),
            "Where the encoder puts test data."
            + _about_classes(dataset)
            + _where_the_prior_is(run),
        )
    if shape and getattr(module, "latent_dim", 0) == 2 and hasattr(module, "decode"):
        add(
            "manifold",
            plot_manifold(module, shape, data=data, pixels=pixels),
            "What the decoder makes of a grid of latents; each picture stands for the same share "
            "of a standard normal"
            + (", the prior. " if _where_the_prior_is(run) else ". ")
            + pixels_text(pixels),
        )
    if shape and hasattr(module, "sample"):
        add(
            "samples",
            plot_samples(module, shape, data=data, pixels=pixels),
            "What the model believes data look like: a latent is drawn from the prior and decoded. "
            + pixels_text(pixels),
        )
    return figures


def _about_classes(dataset: Dataset) -> str:
    if dataset.test_labels is None:
        return ""
    return " The model did not see the classes."


def _where_the_prior_is(run: Run) -> str:
    """A sentence, where the latents that the encoder gives have a standard normal prior."""
    if type(run.module) is not VAE or run.module.config["prior"] != {"name": "normal"}:
        return ""
    return " The prior is a standard normal around the cross."


def save_figures(figures: Sequence[RunFigure], folder: str | os.PathLike[str]) -> list[Path]:
    """Writes figures as PNG files named after them; makes the folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = [target / f"{shown.name}.png" for shown in figures]
    for path, shown in zip(paths, figures, strict=True):
        with atomic_path(path) as temporary:
            temporary.write_bytes(figure_png(shown.figure))
    return paths
