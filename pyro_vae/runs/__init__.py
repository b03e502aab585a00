r"""Runs: one training on named data, kept in a folder that can be loaded, evaluated and resumed.

`start_run` trains a model on a data set and keeps it; `resume_run` goes on; `load_run` gives the
programs back; `evaluate_run` measures them on the test set. The command line calls these four, and
so may a script. Which model, from which parts, on which data: that is for `models.choices`.

What a folder holds is said in `inference.checkpoint`; `evaluate_run` adds ``evaluation.nc``. A
folder is data, never code: the class of the model is looked up in a table of this package's models,
and weights are read from safetensors alone.
"""

from pyro_vae.inference.svi import CheckpointError
from pyro_vae.runs.data import BINARIZATION_SEED, load_run_data, load_training_data, split_training
from pyro_vae.runs.evaluate import evaluate_run, load_evaluation, load_test_data
from pyro_vae.runs.load import Run, clear_run, load_run
from pyro_vae.runs.train import RunSettings, default_schedule, resume_run, start_run

__all__ = [
    "BINARIZATION_SEED",
    "CheckpointError",
    "Run",
    "RunSettings",
    "clear_run",
    "default_schedule",
    "evaluate_run",
    "load_evaluation",
    "load_run",
    "load_run_data",
    "load_test_data",
    "load_training_data",
    "resume_run",
    "split_training",
    "start_run",
]
