"""Runs measured on the test set."""

import hashlib
import os
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from pyro_vae.checks import check_count
from pyro_vae.data import Seed, as_seed
from pyro_vae.diagnostics.evidence import log_evidence
from pyro_vae.inference.svi import CheckpointError
from pyro_vae.results import Result, load_result
from pyro_vae.runs.data import load_run_data
from pyro_vae.runs.load import Run

__all__ = ["evaluate_run", "load_evaluation", "load_test_data"]


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
    x = load_test_data(run, num_data, root)
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


def load_test_data(
    run: Run, num_data: int | None = None, root: str | os.PathLike[str] | None = None
) -> Float[Tensor, "batch features"]:
    """The test data of a run, in its precision.

    Args:
        run: The run.
        num_data: Only the first so many; None for all.
        root: Folder of the data files, as for `load_dataset`.

    Raises:
        CheckpointError: If the run does not say its data, or those found are others.
        DatasetError: If the data are missing, or have no test set.
        ValueError: If `num_data` is not positive.
    """
    test = load_run_data(run, root).test
    check_count("num_data", num_data, optional=True)
    if len(test) == 0:
        raise CheckpointError(
            f"the data set {run.data_name!r} has no test set: pass data to log_evidence(run.model, "
            "run.guide, x) yourself"
        )
    return test[:num_data].to(next(run.module.parameters()))


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
