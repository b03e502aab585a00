"""A run folder, loaded: its model and guide with their weights, and how they were trained."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.inference.programs import FittedProgram, Program, common_owner, pyro_parameters
from pyro_vae.inference.svi import (
    FORMAT,
    CheckpointError,
    LoadedProgram,
    SavedParameters,
    history_result,
    load_tensors,
    read_json,
    read_rows,
    tensor_type,
)
from pyro_vae.models import CLASSES
from pyro_vae.results import Result, leftovers

__all__ = ["Run", "build_module", "clear_run", "load_run"]

_WEIGHT_FILES = ("model.safetensors", "training.safetensors")
_DERIVED_FILES = (
    "README.md",
    "config.json",
    "evaluation.nc",
    "history.jsonl",
    "report.html",
    "samples.png",
)


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
            module = build_module(folder, config.get("model"))
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


def build_module(folder: Path, described: Any) -> Any:
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
