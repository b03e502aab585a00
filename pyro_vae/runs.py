r"""Runs: one training on named data, kept in a folder that can be loaded, evaluated and resumed.

`start_run` trains a model on a data set and keeps it; `resume_run` goes on; `load_run` gives the
programs back; `evaluate_run` measures them on the test set. The command line calls these four, and
so may a script. Which model, from which parts, on which data: that is for `models.choices`.

What a folder holds is said in `inference.checkpoint`; `evaluate_run` adds ``evaluation.nc``. A
folder is data, never code: the class of the model is looked up in a table of this package's models,
and weights are read from safetensors alone.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_vae.checks import check_count
from pyro_vae.data import Dataset, Seed, as_seed, load_dataset
from pyro_vae.diagnostics.evidence import log_evidence
from pyro_vae.inference.estimators import make_objective, objective_names
from pyro_vae.inference.programs import (
    FittedProgram,
    Program,
    common_owner,
    keep_random_state,
    pyro_parameters,
)
from pyro_vae.inference.svi import (
    FORMAT,
    CheckpointError,
    Fit,
    LoadedProgram,
    SavedParameters,
    check_same_settings,
    fit,
    history_result,
    holds_run,
    load_tensors,
    read_json,
    read_rows,
    tensor_type,
)
from pyro_vae.models import (
    AUTOENCODERS,
    CLASSES,
    build_model,
    choose_likelihood,
    data_pseudo_inputs,
    model_name,
    on_levels,
)
from pyro_vae.models.parts import Part
from pyro_vae.progress import announced, say
from pyro_vae.results import Result, leftovers, load_result

__all__ = [
    "BINARIZATION_SEED",
    "CheckpointError",
    "Run",
    "clear_run",
    "default_schedule",
    "evaluate_run",
    "load_evaluation",
    "load_run",
    "load_run_data",
    "load_training_data",
    "resume_run",
    "split_training",
    "start_run",
]

BINARIZATION_SEED = 0
"""The draws of binary test pixels; one for all runs, so that their numbers are comparable."""

_WEIGHT_FILES = ("model.safetensors", "training.safetensors")
_DERIVED_FILES = (
    "README.md",
    "config.json",
    "evaluation.nc",
    "history.jsonl",
    "report.html",
    "samples.png",
)
_HELD_OUT_EVERY = 10


@dataclass(frozen=True, repr=False)
class Run:
    """A run folder, loaded.

    Attributes:
        path: The folder.
        module: The model with its weights, in evaluation mode; of programs that were passed to
            `load_run` the module whose methods they are, if there is one, as it was.
        model: Its generative program, `module.model`.
        guide: Its guide, `module.guide`.
        config: What ``config.json`` says.
        history: The bound while training, a row an epoch (see `fit`); without variables if no
            epoch had ended.
    """

    path: Path
    module: Any
    model: Program
    guide: Program
    config: dict[str, Any]
    history: Result

    @property
    def data_name(self) -> str:
        """The name of the data it was trained on, or "data of the caller"."""
        return str(self.config.get("data", {}).get("name", "data of the caller"))

    def __repr__(self) -> str:
        described = self.config["model"]
        arguments = ", ".join(f"{k}={v!r}" for k, v in described.get("arguments", {}).items())
        epochs = int(self.history.epoch[-1]) if self.history.sizes.get("epoch") else 0
        name = described.get("class", described.get("program"))
        return f"<run {self.path}: {name}({arguments}) on {self.data_name}, {epochs} epochs>"


# --- loading --------------------------------------------------------------------------------------


def load_run(
    path: str | os.PathLike[str],
    *,
    model: Program | None = None,
    guide: Program | None = None,
) -> Run:
    """Loads a run folder; no code that lies in it is run.

    Args:
        path: The folder, as `fit(checkpoint=...)` or `start_run` wrote it.
        model: The model that was trained, where it is none of this package's; with `guide`.
        guide: The guide that was trained, likewise.

    Returns:
        The model and the guide with the weights in place, and how they were trained. Modules of
        programs that were passed in have the run's weights; `pyro.param` statements get theirs when
        they first run, whatever the caller's parameter store holds.

    Raises:
        CheckpointError: If the folder or a file is missing or damaged, was written by a newer
            version, or holds a program that is none of this package's models and was not passed;
            if names, shapes or dtypes of parameters differ from those of the programs (for
            `pyro.param`, when the programs first run).
        ValueError: If one of model and guide is passed without the other.

    Example:
        >>> load_run("no/such/run")
        Traceback (most recent call last):
        ...
        pyro_vae.inference.svi.checkpoint.CheckpointError: no/such/run is not a folder: ...
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: name a run folder, which pyro-vae fit or "
            "fit(checkpoint=...) writes"
        )
    config = read_json(folder / "config.json")
    version = config.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise CheckpointError(
            f"{folder / 'config.json'} has format {version!r}, but this version of pyro_vae reads "
            f"up to {FORMAT}: install a newer pyro_vae"
        )
    if (model is None) != (guide is None):
        raise ValueError("a run has a model and a guide: pass both, or neither")
    module: Any
    if model is None or guide is None:
        with torch.device("meta"):  # without memory for its weights yet
            module = _build(folder, config.get("model"))
        weights, _ = load_tensors(folder / "model.safetensors")
        _fill(folder, module, weights)
        model, guide = module.model, module.guide
    else:
        module, model, guide = _give(folder, config.get("model"), model, guide)
    rows = read_rows(folder / "history.jsonl")
    trained = config.get("fit", {})
    return Run(
        path=folder,
        module=module,
        model=model,
        guide=guide,
        config=config,
        history=history_result(rows, config, trained.get("seed"), trained.get("data_sha256")),
    )


def clear_run(folder: str | os.PathLike[str]) -> None:
    """Deletes a run's own files from its folder, and what was made from them; nothing else.

    A folder without weights holds no run, whatever else is called README.md there: it is left as it
    is.
    """
    target = Path(folder)
    if not any((target / name).exists() for name in _WEIGHT_FILES):
        return
    figures = sorted((target / "figures").glob("*.png"))
    derived = [target / name for name in _DERIVED_FILES]
    names = (*_DERIVED_FILES, *_WEIGHT_FILES)
    killed = [path for name in names for path in leftovers(target / name)]
    for path in (*derived, *figures, *killed):
        path.unlink(missing_ok=True)
    for name in _WEIGHT_FILES:
        (target / name).unlink(missing_ok=True)


def _build(folder: Path, described: Any) -> Any:
    """The module that a run's configuration describes."""
    described = described if isinstance(described, dict) else {}
    name = described.get("class")
    if name is None:
        raise CheckpointError(
            f"{folder} holds the weights of a program of its own "
            f"({described.get('program', 'unknown')}), not of a class of pyro_vae.models: build "
            "the programs yourself, and pass them, load_run(path, model=model, guide=guide)"
        )
    if name not in CLASSES:
        raise CheckpointError(
            f"{folder} holds a {name!r}, which this version of pyro_vae does not know (it knows "
            f"{', '.join(CLASSES)}): install the version that wrote it"
        )
    try:
        return CLASSES[name](**described.get("arguments", {})).eval()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"config.json of {folder} does not describe a {name} ({error}): restore it from a copy"
        ) from error


def _fill(folder: Path, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"the weights in {folder} do not fit the model in its config.json: {name} is "
            f"{found.get(name, 'missing')} there and {wanted.get(name, 'unknown')} here "
            f"({len(wrong)} of {len(wanted)} differ). Restore both files from one run"
        )
    dtypes = {value.dtype for value in weights.values()}
    if len(dtypes) != 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise CheckpointError(
            f"the weights in {folder} are of {sorted(map(str, dtypes))}, but must be of one "
            "floating-point type: restore model.safetensors from a copy"
        )
    module.load_state_dict(dict(weights), assign=True)


def _give(
    folder: Path, described: Any, model: Program, guide: Program
) -> tuple[nn.Module | None, Program, Program]:
    """The caller's programs with the weights of a run, and the module whose methods they are."""
    weights, _ = load_tensors(folder / "model.safetensors")
    owner = common_owner(model, guide)
    left_out = described.get("statistics_left_out") if isinstance(described, dict) else None
    if owner is None and left_out:
        raise CheckpointError(
            f"{folder} lacks the running statistics of its {', '.join(left_out)}, which are no "
            "parameters: make model and guide methods of one nn.Module, and train that"
        )
    if twice := [name for name in weights if "#" in name]:
        raise CheckpointError(
            f"in {folder} two modules were registered as {twice[0].partition('$$$')[0]!r}, so that "
            "nothing tells their weights apart: give each a name of its own, and train again"
        )
    if owner is not None:
        own = owner.state_dict()
        _check_weights(folder, own, {n: v for n, v in weights.items() if n in own})
        owner.load_state_dict({name: weights.pop(name) for name in own})
        if not weights:
            return owner, model, guide
    saved = SavedParameters(folder, weights, owner.parameters() if owner is not None else ())
    for program in (model, guide):
        for name, parameter in pyro_parameters(program):
            if name in weights:
                saved.give(name, parameter)
    state: dict[str, Any] = {"params": {}, "constraints": {}}
    return (
        owner,
        FittedProgram(LoadedProgram(model, "model", saved), state),
        FittedProgram(LoadedProgram(guide, "guide", saved), state),
    )


def _check_weights(folder: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name, value in wanted.items():
        here, there = tensor_type(value), "missing"
        if name in found:
            there = tensor_type(found[name])
        if here != there:
            raise CheckpointError(
                f"the weights in {folder} do not fit the programs that were passed: {name} is "
                f"{there} there and {here} here. Pass the programs that the run was trained with"
            )


# --- data -----------------------------------------------------------------------------------------


def load_training_data(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    binarization: str | None = None,
    download: bool = False,
) -> Dataset:
    """Loads a data set as runs use it: its binary pixels drawn with `BINARIZATION_SEED`.

    Args:
        name: As `load_dataset` takes it.
        root: Folder of the files, as for `load_dataset`.
        binarization: As for `Dataset.binarize`.
        download: Fetches files that are missing.

    Raises:
        ValueError: If there is no such data set, or it cannot be binarised as asked.
        DatasetError: If a file is missing, damaged or cannot be fetched.
    """
    draws = binarization in ("dynamic", "static")
    generator = torch.Generator().manual_seed(BINARIZATION_SEED) if draws else None
    with announced(f"reading {name}", say):
        return load_dataset(name, root, download, binarize=binarization, generator=generator)


def split_training(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Splits training data from data held out for early stopping; the test set is not touched.

    Held out is the data set's own validation part, else every tenth training datum (with its
    binary pixels drawn once, where binarisation is dynamic).

    Args:
        dataset: From `load_training_data`.

    Returns:
        Training data and held-out data, shapes (train, features) and (held out, features).

    Example:
        >>> train, held_out = split_training(load_training_data("iris"))
        >>> len(train), len(held_out)
        (108, 12)
    """
    if dataset.validation is not None:
        return dataset.train, dataset.validation
    place = torch.arange(len(dataset.train)) % _HELD_OUT_EVERY
    last = place == _HELD_OUT_EVERY - 1
    held_out = dataset.train[last]
    if dataset.transform is not None:
        generator = torch.Generator().manual_seed(BINARIZATION_SEED + 1)
        held_out = dataset.transform(held_out, generator)
    return dataset.train[~last], held_out


def load_run_data(
    run: Run, root: str | os.PathLike[str] | None = None, *, download: bool = False
) -> Dataset:
    """Loads the data a run was trained on, to the byte.

    Args:
        run: The run.
        root: Folder of the files, as for `load_dataset`.
        download: Fetches files that are missing.

    Raises:
        CheckpointError: If the run does not say its data, or those found are others.
        DatasetError: If a file is missing, damaged or cannot be fetched.
    """
    described = run.config.get("data", {})
    if "sha256" not in described:
        raise CheckpointError(
            f"{run.path} was trained on data of the caller, not on a named data set: pass them to "
            "log_evidence(run.model, run.guide, x) yourself"
        )
    dataset = load_training_data(
        described["name"], root, binarization=described["binarization"], download=download
    )
    if dataset.sha256() != described["sha256"]:
        raise CheckpointError(
            f"the data set {described['name']!r} found here is not the one that {run.path} was "
            "trained on (its sha256 differs): name the folder that holds those data"
        )
    return dataset


def _describe(dataset: Dataset) -> dict[str, Any]:
    held_out = (
        "the data set's validation part"
        if dataset.validation is not None
        else f"every {_HELD_OUT_EVERY}th training datum"
    )
    return {
        "name": dataset.name,
        "binarization": dataset.binarization,
        "binarization_seed": BINARIZATION_SEED,
        "measure": dataset.measure,
        "image_shape": list(dataset.image_shape) if dataset.image_shape else None,
        "pixels": dataset.pixels,
        "held_out": held_out,
        "sha256": dataset.sha256(),
    }


# --- training -------------------------------------------------------------------------------------


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


def start_run(
    folder: str | os.PathLike[str],
    dataset: Dataset,
    *,
    model: Part = "vae",
    latent_dim: int = 20,
    hidden: Sequence[int] = (400,),
    likelihood: Part | None = None,
    prior: Part | None = None,
    posterior: Part | None = None,
    network: Part | None = None,
    activation: str = "tanh",
    objective: Part | None = None,
    num_particles: int | None = None,
    batch_size: int = 128,
    epochs: int | None = None,
    patience: int | None = None,
    learning_rate: float = 1e-3,
    warmup_epochs: int = 0,
    seed: Seed = 0,
    device: str | torch.device | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> Fit:
    """Trains a model on a data set, and keeps the run in a folder.

    The held-out bound (see `split_training`) stops training early, and the best parameters are
    kept. The test set is not looked at. Whatever the objective, that bound is the ELBO; but an
    autoencoder has none, and is stopped by its own objective, a MAP one.

    Parts are names or mappings of a name and arguments; see `models.choices.build_model`.

    Args:
        folder: The run folder; one that holds a run is refused unless `overwrite` is set.
        dataset: From `load_training_data`.
        model: "vae", "two_layer", or a kind of autoencoder.
        latent_dim: Number of latents, or of codes; with two layers, of the lower one.
        hidden: Sizes of the encoder's hidden layers; the decoder has them in reverse order.
        likelihood: None for the one that suits the data's measure. One of grey levels gets the
            number of levels that the data have.
        prior: None for a standard normal, or an autoencoder's own. The pseudo-inputs of a
            VampPrior start at training data.
        posterior: None for a diagonal one.
        network: None for perceptrons.
        activation: As for `VAE`.
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
    seed = as_seed(seed)
    check_count("batch_size", batch_size)
    loss = _choose_loss(model, objective, num_particles, warmup_epochs)
    chosen = choose_likelihood(dataset.measure, likelihood, dataset.pixels)
    dataset, chosen = on_levels(dataset, chosen)
    train, held_out = split_training(dataset)
    with keep_random_state(), _default_dtype(train.dtype):
        pyro.set_rng_seed(seed)
        module = build_model(
            dataset,
            model,
            latent_dim=latent_dim,
            hidden=hidden,
            likelihood=chosen,
            prior=prior,
            posterior=posterior,
            network=network,
            activation=activation,
        )
        data_pseudo_inputs(module, train)
    schedule: dict[str, Any] = default_schedule(len(train), batch_size)
    if epochs is not None:
        looks = max(min(schedule["evaluate_every"], epochs // 10), 1)
        schedule |= {"epochs": epochs, "evaluate_every": looks}
    if patience is not None:
        schedule["patience"] = patience or None
    if overwrite:
        clear_run(folder)
    return fit(
        module.model,
        module.guide,
        train,
        loss=loss,
        validation=held_out,
        transform=dataset.transform,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_epochs=warmup_epochs,
        seed=seed,
        device=device,
        threads=threads,
        checkpoint=Path(folder),
        resume=resume,
        config={"data": _describe(dataset)},
        progress=progress,
        **schedule,
    )


def _choose_loss(
    model: Part, objective: Part | None, num_particles: int | None, warmup_epochs: int
) -> ELBO | None:
    """The loss, or a sentence on why an autoencoder has no choice."""
    name = model_name(model)
    if name in AUTOENCODERS:
        given = {
            "objective": objective,
            "num_particles": num_particles,
            "warmup_epochs": warmup_epochs,
        }
        wrong = [what for what, value in given.items() if value]
        if wrong:
            raise ValueError(
                f"the {name} autoencoder takes no {wrong[0]}: its guide is a point, so what it "
                "maximises is a MAP objective, with nothing to draw and no KL term. Leave it out, "
                "or use the model 'vae'"
            )
        return None
    if objective is None and num_particles in (None, 1):
        return None
    return make_objective(objective or "PathwiseELBO", num_particles)


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
        module = _build(folder, config.get("model"))
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


# --- evaluation -----------------------------------------------------------------------------------


def evaluate_run(
    run: Run,
    *,
    num_particles: int = 1000,
    num_data: int | None = None,
    seed: Seed = 0,
    root: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Measures ELBO, importance-weighted evidence and gap on the test set; writes evaluation.nc.

    Args:
        run: The run.
        num_particles: Draws from the guide for each datum.
        num_data: Only the first so many test data; None for all.
        seed: Seeds the draws.
        root: Folder of the data files, as for `load_dataset`.
        progress: Shows a bar where stderr is a terminal.

    Returns:
        What `log_evidence` returns; its attributes also name the data, the part of them and the
        sha256 of the weights.

    Raises:
        CheckpointError: If the run does not say its data, or those found are others.
        DatasetError: If the data are missing, or have no test set.
        ProgramError: If the run is one of an autoencoder, for which these numbers do not exist.
        ValueError: If a number is out of its range.
    """
    seed = as_seed(seed)
    test = load_run_data(run, root).test
    check_count("num_data", num_data, optional=True)
    if len(test) == 0:
        raise CheckpointError(
            f"the data set {run.data_name!r} has no test set: pass data to log_evidence(run.model, "
            "run.guide, x) yourself"
        )
    like = next(run.module.parameters())
    x = test[:num_data].to(like)
    found = log_evidence(
        run.model, run.guide, x, num_particles=num_particles, seed=seed, progress=progress
    )
    found.attrs |= {
        "data": run.data_name,
        "part": "test",
        "weights_sha256": _weights_sha256(run.path),
    }
    found.save(run.path / "evaluation.nc")
    return found


def load_evaluation(run: Run) -> Result | None:
    """What `evaluate_run` last found; None if it never ran, or the weights have changed since.

    Raises:
        ValueError: If the file is damaged.
    """
    path = run.path / "evaluation.nc"
    if not path.is_file():
        return None
    found = load_result(path)
    return found if found.attrs.get("weights_sha256") == _weights_sha256(run.path) else None


def _weights_sha256(folder: Path) -> str:
    with (folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
