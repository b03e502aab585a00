"""What a caller asks of `fit`, checked before anything runs."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyro.infer import (
    ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.optim import PyroOptim

from pyro_vae.checks import check_count
from pyro_vae.inference.svi.checkpoint import CheckpointError, holds_run

__all__ = ["CONVERGED", "DEFAULT_EPOCHS", "DEFAULT_RATE", "FitSettings", "scales_sites"]

CONVERGED = "converged"
"""What `epochs` says for a training that ends by itself."""
DEFAULT_EPOCHS = 100
DEFAULT_RATE = 1e-3

_ANNEALABLE = (Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO)


@dataclass(frozen=True)
class FitSettings:
    """Arguments of `fit` that are neither programs nor data, under the same names; see there.

    Raises:
        ValueError: If one is out of its range, or two do not go together.
        CheckpointError: If `checkpoint` holds a run and `resume` is not set, or is a file.
    """

    loss: ELBO | None
    optimizer: Any
    learning_rate: float | Callable[[int], float] | None
    epochs: int | Literal["converged"] | None
    batch_size: int | None
    seed: int
    evaluate_every: int
    patience: int | None
    warmup_epochs: int
    checkpoint: Path | None
    checkpoint_every: int
    resume: bool
    threads: int | None
    config: Mapping[str, Any]
    method: str = "svi"
    num_draws: int | None = None
    num_paths: int | None = None

    def __post_init__(self) -> None:
        for name in ("evaluate_every", "checkpoint_every"):
            check_count(name, getattr(self, name))
        if self.epochs != CONVERGED:
            check_count("epochs", self.epochs, optional=True)
        for name in ("batch_size", "patience", "threads"):
            check_count(name, getattr(self, name), optional=True)
        self._check_loss()
        self._check_learning_rate()
        if not _is_integer(self.seed) or not 0 <= self.seed < 2**32:  # what NumPy takes
            raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, not {self.seed!r}")
        self._check_warmup()
        if self.epochs == CONVERGED and (found := self.speaks_of_epochs):
            raise ValueError(
                f"{found} does not go with epochs='converged', which has a rule of its own; name "
                "the number of epochs, or leave it out"
            )
        try:
            json.dumps(dict(self.config), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"config must be what JSON can hold ({error})") from error
        self._check_folder()

    @property
    def speaks_of_epochs(self) -> str:
        """The argument that has no meaning where the number of epochs is not known, or ""."""
        found = {
            "patience": self.patience is not None,
            "warmup_epochs": self.warmup_epochs > 0,
            "a learning-rate function": callable(self.learning_rate),
            "a PyroOptim": isinstance(self.optimizer, PyroOptim),
        }
        return next((name for name, given in found.items() if given), "")

    def _check_loss(self) -> None:
        if self.loss is not None and not isinstance(self.loss, ELBO):
            raise ValueError(
                f"loss must be an ELBO such as Trace_ELBO() or None, not {self.loss!r}"
            )

    def _check_learning_rate(self) -> None:
        rate = self.learning_rate
        if callable(rate):
            if isinstance(self.optimizer, PyroOptim):
                raise ValueError(
                    "a learning-rate function needs a torch optimizer; pass optimizer=None or a "
                    "function of parameters"
                )
            return
        if rate is None:
            return
        number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if not (number and 0 < rate < math.inf):
            raise ValueError(f"learning_rate must be a positive number or a function, not {rate!r}")

    def _check_warmup(self) -> None:
        epochs, loss = self.warmup_epochs, self.loss
        check_count("warmup_epochs", epochs, 0)
        if epochs and loss is not None and not scales_sites(loss):
            raise ValueError(
                f"KL warm-up scales sites, which is wrong inside {type(loss).__name__}; use a loss "
                "that is an ELBO"
            )

    def _check_folder(self) -> None:
        folder = self.checkpoint
        if folder is None:
            if self.resume:
                raise ValueError("resume=True needs checkpoint=FOLDER, the run to go on from")
            return
        if isinstance(self.optimizer, PyroOptim):
            raise ValueError(
                "a PyroOptim cannot be written to a checkpoint; pass optimizer as a function from "
                "parameters to a torch optimizer"
            )
        if not self.resume and (found := holds_run(folder)):
            raise CheckpointError(
                f"{folder} already has a {found}, which this run would replace; pass resume=True "
                "to go on with that run, name another folder, or delete it"
            )
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file; checkpoint names a folder")


def scales_sites(loss: ELBO) -> bool:
    """Whether a loss of Pyro's is an ELBO in which every site counts by its scale, step by step."""
    jitted = type(loss).__name__.startswith("Jit")  # keeps the scales of its first step
    reweights = isinstance(loss, TraceTailAdaptive_ELBO)
    return isinstance(loss, _ANNEALABLE) and not (jitted or reweights)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
