"""Several trainings of one pair: which is kept, how far they agree, the mixture of their guides."""

from pyro_vae.inference.svi.restarts.agreement import Restarts, compare_runs, restarts_table
from pyro_vae.inference.svi.restarts.mixture import HeldProgram, MixtureGuide, refuse_mixture
from pyro_vae.inference.svi.restarts.runs import fit_restarts, settings_of_runs

__all__ = [
    "HeldProgram",
    "MixtureGuide",
    "Restarts",
    "compare_runs",
    "fit_restarts",
    "refuse_mixture",
    "restarts_table",
    "settings_of_runs",
]
