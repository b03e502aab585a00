"""`fit`: Pyro's SVI without its silent traps, with history, checkpoints and exact resume."""

from pyro_vae.inference.svi.checkpoint import (
    FORMAT,
    CheckpointError,
    LoadedProgram,
    SavedParameters,
    check_same_settings,
    holds_run,
    load_tensors,
    read_json,
    read_rows,
    save_tensors,
    tensor_type,
)
from pyro_vae.inference.svi.fit import fit
from pyro_vae.inference.svi.history import Convergence, Fit, Phase, best_row, history_result
from pyro_vae.inference.svi.methods import METHODS, FittingMethod
from pyro_vae.inference.svi.mini_batches import TrainingData
from pyro_vae.inference.svi.optimizer import TrainingError
from pyro_vae.inference.svi.restarts import MixtureGuide, Restarts, compare_runs, restarts_table
from pyro_vae.inference.svi.step import Interruptible, deferred_interrupt, without_validation

__all__ = [
    "FORMAT",
    "METHODS",
    "CheckpointError",
    "Convergence",
    "Fit",
    "FittingMethod",
    "Interruptible",
    "LoadedProgram",
    "MixtureGuide",
    "Phase",
    "Restarts",
    "SavedParameters",
    "TrainingData",
    "TrainingError",
    "best_row",
    "check_same_settings",
    "compare_runs",
    "deferred_interrupt",
    "fit",
    "history_result",
    "holds_run",
    "load_tensors",
    "read_json",
    "read_rows",
    "restarts_table",
    "save_tensors",
    "tensor_type",
    "without_validation",
]
