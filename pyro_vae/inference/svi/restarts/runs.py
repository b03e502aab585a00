"""Trainings of one pair from several starts: how they begin, which is kept, what they leave."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_vae.inference.programs import (
    Pair,
    ProgramError,
    evaluation_mode,
    modules_of,
    program_scope,
)
from pyro_vae.inference.svi.checkpoint import CheckpointError, holds_run
from pyro_vae.inference.svi.history import Fit, best_row
from pyro_vae.inference.svi.loop import TrainingRun
from pyro_vae.inference.svi.restarts.agreement import Restarts, compare_runs, restarts_table
from pyro_vae.inference.svi.restarts.mixture import HeldProgram
from pyro_vae.inference.svi.settings import FitSettings
from pyro_vae.progress import say

__all__ = ["fit_restarts", "settings_of_runs"]

_MOST_DATA = 500  # that have weights of their own, on which runs are compared
_WIDTH = 2.0  # of the uniform that moves a start, to either side, as in Stan


def settings_of_runs(settings: FitSettings, count: int) -> list[FitSettings]:
    """The settings of each run: seeds differ, and each has a folder of its own in the checkpoint.

    Raises:
        CheckpointError: If the folder holds a run itself, or one of its folders does and `resume`
            is not set.
    """
    folder = settings.checkpoint
    if count > 1 and folder is not None and (found := holds_run(folder)):
        raise CheckpointError(
            f"{folder} already has a {found} of a single run; with restarts name a folder for the "
            "folders of all runs"
        )
    seeds = [settings.seed]
    for place in range(1, count):
        seeds.append(int(np.random.SeedSequence((settings.seed, place)).generate_state(1)[0]))
    folders = [
        folder and folder / f"run_{place}" if count > 1 else folder for place in range(count)
    ]
    return [replace(settings, seed=s, checkpoint=f) for s, f in zip(seeds, folders, strict=True)]


def fit_restarts(
    train: Callable[[FitSettings, Callable[[TrainingRun], None]], tuple[TrainingRun, Fit]],
    settings: list[FitSettings],
) -> tuple[TrainingRun, Fit]:
    """Trains from several starts, keeps the best, and says how far the runs agree.

    Args:
        train: Makes one run of the settings; calls the function before the first step.
        settings: Of each run.

    Returns:
        The run that is kept, and its fit with `restarts`; modules have its values.
    """
    begun: _Begun | None = None
    runs: list[Fit] = []
    live: list[Fit] = []
    ends: list[dict[int, Tensor]] = []
    trained: list[TrainingRun] = []
    for place, asked in enumerate(settings):
        if begun is not None:
            begun.put_back()
        say(f"run {place + 1} of {len(settings)}")

        def start(run: TrainingRun) -> None:
            nonlocal begun
            if begun is None:
                begun = _Begun.of(run)
            else:
                begun.disperse(run)

        run, found = train(asked, start)
        trained.append(run)
        assert begun is not None
        ends.append(begun.now())
        live.append(found)
        modules = begun.modules
        held = HeldProgram(found.model, modules), HeldProgram(found.guide, modules)
        runs.append(replace(found, model=held[0], guide=held[1]))
        if found.status == "interrupted":
            break
    assert begun is not None
    measured = replace(_measured(runs, trained[0], settings[0].seed), runs=tuple(runs))
    begun.put_back(ends[measured.kept])
    best, last = live[measured.kept], live[-1]
    return trained[measured.kept], replace(
        best,
        status=last.status if last.status == "interrupted" else best.status,
        restarts=measured,
    )


def _measured(runs: list[Fit], first: TrainingRun, seed: int) -> Restarts:
    """What fresh draws say of the runs, or the ends of their histories where there are none."""
    found, data = first.prepared, first.data
    x = data.first(min(data.length, _MOST_DATA) if found.takes_some else data.length, stream=3)
    about: dict[str, Any] = {
        "config": runs[0].config,
        "seed": seed,
        "data_sha256": first.data_sha256,
    }
    refusal = "there is only one run"
    with (
        evaluation_mode(first.model, first.guide, *found.modules),
        found.on(None, found.length_of(x)),
    ):
        try:
            pairs = []
            for run in runs:
                with program_scope(seed):
                    pairs.append(Pair.inspect(run.model, run.guide, x, joint=found.joint))
            if len(runs) > 1:
                return compare_runs(pairs, **about)
        except ProgramError as error:
            refusal = str(error)
    ends = [run.history.bound.values[-1:] for run in runs if "bound" in run.history]
    bounds = [float(end[0]) if len(end) else math.nan for end in ends] or [math.nan]
    kept = best_row(bounds)
    note = f"what the runs agree on is not known, and there is no mixture of the guides: {refusal}"
    return Restarts(restarts_table(bounds, kept=kept, notes=[note], **about), kept, refusal=refusal)


@dataclass
class _Begun:
    """What the first run began with: tensors of modules, which all runs move in place.

    Attributes:
        modules: All that the programs reach.
        tensors: Their parameters and buffers by identity, with copies of the values.
        values: All parameters by name, unconstrained.
    """

    modules: list[nn.Module]
    tensors: dict[int, tuple[Tensor, Tensor]]
    values: dict[str, Tensor]

    @classmethod
    def of(cls, run: TrainingRun) -> "_Begun":
        roots = [root for program in (run.model, run.guide) for root in modules_of(program)]
        reached = [module for root in roots for module in root.modules()]
        modules = {id(m): m for m in (*run.prepared.modules, *reached)}
        tensors = {
            id(t): (t, t.detach().clone())
            for module in modules.values()
            for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        }
        values = {n: v.detach().clone() for n, v in _parameters(run).items()}
        return cls(list(modules.values()), tensors, values)

    def now(self) -> dict[int, Tensor]:
        """Copies of the modules' tensors as they are."""
        return {key: tensor.detach().clone() for key, (tensor, _) in self.tensors.items()}

    @torch.no_grad()
    def put_back(self, values: dict[int, Tensor] | None = None) -> None:
        """Gives the modules' tensors the values that they began with, or these."""
        for key, (tensor, start) in self.tensors.items():
            tensor.copy_(start if values is None else values[key])

    @torch.no_grad()
    def disperse(self, run: TrainingRun) -> None:
        """Moves what would start where the first run did; see `fit`."""
        trained = _parameters(run)
        ids = {id(p) for p in trained.values() if p.requires_grad}
        anew: set[int] = set()
        for module in self.modules:
            own = list(module.parameters(recurse=False))
            reset = getattr(module, "reset_parameters", None)
            if callable(reset) and own and all(id(p) in ids for p in own):
                if any(bool(p.count_nonzero()) for p in own):  # zeros are meant
                    reset()
                anew |= {id(p) for p in own}
        store = pyro.get_param_store()
        for name, value in trained.items():
            if id(value) not in ids or id(value) in anew:
                continue
            before = self.values.get(name)
            if before is not None and before.shape == value.shape and torch.equal(before, value):
                matrix = store._constraints[name].event_dim >= 2
                weights = isinstance(value, nn.Parameter) and value.dim() >= 2
                unit = float(value.square().mean().sqrt()) if matrix or weights else 1.0
                value += _WIDTH * unit * (2 * torch.rand_like(value) - 1)


def _parameters(run: TrainingRun) -> dict[str, Tensor]:
    """What a run trains, unconstrained, by name."""
    named = pyro.get_param_store().named_parameters()
    return {name: value for name, value in named if name not in run.prepared.foreign}
