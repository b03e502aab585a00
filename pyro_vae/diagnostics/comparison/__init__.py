"""Which model predicts best? `loo`, `kfold` and `held_out` log predictive densities."""

from pyro_vae.diagnostics.comparison.elpd_data import elpd_data
from pyro_vae.diagnostics.comparison.held_out import held_out, kfold, num_data_of
from pyro_vae.diagnostics.comparison.loo import loo
from pyro_vae.diagnostics.comparison.refits import Refit, fit_again, refitted, some_of

__all__ = [
    "Refit",
    "elpd_data",
    "fit_again",
    "held_out",
    "kfold",
    "loo",
    "num_data_of",
    "refitted",
    "some_of",
]
