"""Runs begun and gone on with: what is trained and how is said by two dataclasses."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO

from pyro_vae.checks import check_count
from pyro_vae.data import Dataset, Seed, as_seed
from pyro_vae.inference.estimators import make_objective, objective_names
from pyro_vae.inference.programs import keep_random_state
from pyro_vae.inference.svi import (
    CheckpointError,
    Fit,
    check_same_settings,
    fit,
    history_result,
    holds_run,
    load_tensors,
    read_json,
)
from pyro_vae.models import (
    AUTOENCODERS,
    ModelSpec,
    build_model,
    choose_likelihood,
    data_pseudo_inputs,
    model_name,
    on_levels,
)
from pyro_vae.models.parts import Part
from pyro_vae.runs.data import describe_data, load_run_data, split_training
from pyro_vae.runs.load import Run, build_module, clear_run

__all__ = ["RunSettings", "default_schedule", "resume_run", "start_run"]


def default_schedule(num_data: int, batch_size: int) -> dict[str, int]:
    """How long to train, and how often to look, where nobody says.

    About 10,000 steps, but 20 to 500 epochs; the held-out bound every 50 steps or so, at least once
    an epoch; a checkpoint every 1000 steps; patience for a tenth of the looks, at least 5.

    Args:
        num_data: Number of training data.
        batch_size: Data in a mini-batch.

    Returns:
        `epochs`, `evaluate_every`, `checkpoint_every` and `patience`, as `fit` takes them.

    Example:
        >>> default_schedule(num_data=54_000, batch_size=128)["epochs"]
        24
    """
    steps = math.ceil(num_data / batch_size)
    epochs = min(max(math.ceil(10_000 / steps), 20), 500)
    evaluate_every = max(round(50 / steps), 1)
    return {
        "epochs": epochs,
        "evaluate_every": evaluate_every,
        "checkpoint_every": max(round(1000 / steps), 1),
        "patience": max(epochs // evaluate_every // 10, 5),
    }


@dataclass(frozen=True)
class RunSettings:
    """How a run is trained.

    Attributes:
        objective: What training maximises, see `inference.objective_choice`; None for the ELBO.
        num_particles: Draws from the guide for each datum in a step; None as `make_objective`
            chooses, or 1.
        batch_size: Data in a mini-batch.
        epochs: Passes over the training data; None as in `default_schedule`. A short training
            is looked at ten times at least, where it has so many epochs.
        patience: Looks at the held-out bound without a rise before training stops; None as in
            `default_schedule`, 0 never.
        learning_rate: Of Adam.
        warmup_epochs: Epochs over which the weight of the KL term rises from 0 to 1; for the ELBO.
        seed: Seeds weights, shuffling and particles.
        device: Where to train, such as "cuda"; None for the CPU.
        threads: As for `fit`.
    """

    objective: Part | None = None
    num_particles: int | None = None
    batch_size: int = 128
    epochs: int | None = None
    patience: int | None = None
    learning_rate: float = 1e-3
    warmup_epochs: int = 0
    seed: Seed = 0
    device: str | torch.device | None = None
    threads: int | None = None

    def schedule(self, num_data: int) -> dict[str, Any]:
        """How long to train and how often to look at the held-out bound, as `fit` takes it."""
        schedule: dict[str, Any] = default_schedule(num_data, self.batch_size)
        if self.epochs is not None:
            looks = max(min(schedule["evaluate_every"], self.epochs // 10), 1)
            schedule |= {"epochs": self.epochs, "evaluate_every": looks}
        if self.patience is not None:
            schedule["patience"] = self.patience or None
        return schedule


def start_run(
    folder: str | os.PathLike[str],
    dataset: Dataset,
    spec: ModelSpec,
    settings: RunSettings,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> Fit:
    """Trains a model on a data set, and keeps the run in a folder.

    The held-out bound (see `split_training`) stops training early, and the best parameters are
    kept. The test set is not looked at. Whatever the objective, that bound is the ELBO; but an
    autoencoder has none, and is stopped by its own objective, a MAP one.

    Args:
        folder: The run folder; one that holds a run is refused unless `overwrite` is set.
        dataset: From `load_training_data`.
        spec: Which model. A likelihood of grey levels gets the number of levels that the data
            have; the pseudo-inputs of a VampPrior start at training data.
        settings: How it is trained.
        overwrite: Replaces a run that the folder holds, once the model could be built.
        resume: Goes on with a run of these settings where the folder holds one.
        progress: As for `fit`.

    Returns:
        What `fit` returns.

    Raises:
        ValueError: If the likelihood does not fit the data, parts cannot stand together (says what
            can), or an argument is out of its range.
        CheckpointError: If the folder holds a run, or, with `resume`, one of other settings.
        TrainingError: If the loss is not finite.
    """
    seed = as_seed(settings.seed)
    check_count("batch_size", settings.batch_size)
    loss = _choose_loss(spec.model, settings)
    chosen = choose_likelihood(dataset.measure, spec.likelihood, dataset.pixels)
    dataset, chosen = on_levels(dataset, chosen)
    train, held_out = split_training(dataset)
    with keep_random_state(), _default_dtype(train.dtype):
        pyro.set_rng_seed(seed)
        module = build_model(dataset, replace(spec, likelihood=chosen))
        data_pseudo_inputs(module, train)
    schedule = settings.schedule(len(train))
    if overwrite:
        clear_run(folder)
    return fit(
        module.model,
        module.guide,
        train,
        loss=loss,
        validation=held_out,
        transform=dataset.transform,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_epochs=settings.warmup_epochs,
        seed=seed,
        device=settings.device,
        threads=settings.threads,
        checkpoint=Path(folder),
        resume=resume,
        config={"data": describe_data(dataset)},
        progress=progress,
        **schedule,
    )


def _choose_loss(model: Part, settings: RunSettings) -> ELBO | None:
    """The loss, or a sentence on why an autoencoder has no choice."""
    name = model_name(model)
    if name in AUTOENCODERS:
        names = ("objective", "num_particles", "warmup_epochs")
        wrong = [what for what in names if getattr(settings, what)]
        if wrong:
            raise ValueError(
                f"the {name} autoencoder takes no {wrong[0]}: its guide is a point, so what it "
                "maximises is a MAP objective, with nothing to draw and no KL term. Leave it out, "
                "or use the model 'vae'"
            )
        return None
    if settings.objective is None and settings.num_particles in (None, 1):
        return None
    return make_objective(settings.objective or "PathwiseELBO", settings.num_particles)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Draws are others in another type, so initial weights would depend on the caller's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def resume_run(
    path: str | os.PathLike[str],
    *,
    epochs: int | None = None,
    root: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> Fit:
    """Goes on with a run where its folder says it stopped, or finishes what was left undone there.

    Args:
        path: The run folder, of `start_run`.
        epochs: Passes over the training data in all, those done included; None for the number
            that the run was begun with. A run that has made them is returned as it is.
        root: Folder of the data files, as for `load_dataset`.
        device: Where to train; None for the CPU.
        threads: As for `fit`.
        progress: As for `fit`.

    Raises:
        CheckpointError: If the folder holds no run, or a damaged one.
        DatasetError: If the data are missing.
    """
    run = _begun_run(Path(path))
    settings = run.config["fit"]
    if not isinstance(settings["learning_rate"], int | float):
        raise CheckpointError(
            f"{run.path} was trained with a learning rate that is a function, which its folder "
            "does not hold: resume it with fit(..., resume=True) and that function"
        )
    dataset = load_run_data(run, root)
    train, held_out = split_training(dataset)
    schedule = default_schedule(len(train), settings["batch_size"])
    module: Any = run.module.train()
    return fit(
        module.model,
        module.guide,
        train,
        loss=_loss_of(run),
        validation=held_out,
        transform=dataset.transform,
        device=device,
        threads=threads,
        checkpoint=run.path,
        checkpoint_every=schedule["checkpoint_every"],
        resume=True,
        config={"data": run.config["data"]},
        progress=progress,
        **{
            name: settings[name]
            for name in (
                "batch_size",
                "learning_rate",
                "warmup_epochs",
                "seed",
                "patience",
                "evaluate_every",
            )
        },
        epochs=settings["epochs"] if epochs is None else epochs,
    )


def _begun_run(folder: Path) -> Run:
    """A run as its training state has it, which is written first: the rest may be missing."""
    if holds_run(folder) is None:
        raise CheckpointError(
            f"{folder} holds no run to go on with (one that was killed very early leaves none): "
            "repeat the command that started it, with --resume, and it starts anew"
        )
    _, metadata = load_tensors(folder / "training.safetensors")
    config, state = metadata.get("config", {}), metadata.get("state", {})
    if (folder / "config.json").is_file():  # by hand it cannot be changed
        check_same_settings(folder, config, read_json(folder / "config.json"))
    trained = config.get("fit", {})
    dtype = getattr(torch, trained.get("dtype", "float32"))
    with keep_random_state(), _default_dtype(dtype):
        module = build_module(folder, config.get("model"))
    history = history_result(
        state.get("history", []), config, trained.get("seed"), trained.get("data_sha256")
    )
    return Run(folder, module, module.model, module.guide, config, history)


def _loss_of(run: Run) -> ELBO | None:
    """The loss that a run was begun with."""
    settings = run.config["fit"]
    if settings["loss"] == "Trace_ELBO":
        return None
    if settings["loss"] not in objective_names():
        raise CheckpointError(
            f"{run.path} was trained with {settings['loss']}, which is not chosen by name: resume "
            "it with fit(..., loss=..., resume=True) and that loss"
        )
    return make_objective(
        {"name": settings["loss"], **settings["loss_options"]}, settings["num_particles"]
    )
