"""`fit_em`: EM and its relatives, each half step on the same bound."""

from pyro_vae.inference.em.fit_em import EMFit, fit_em
from pyro_vae.inference.em.num_components import compare_num_components
from pyro_vae.inference.em.online import OnlineState, check_steps, online_step
from pyro_vae.inference.em.sampled import MonteCarloEM
from pyro_vae.inference.em.standard_errors import standard_errors

__all__ = [
    "EMFit",
    "MonteCarloEM",
    "OnlineState",
    "check_steps",
    "compare_num_components",
    "fit_em",
    "online_step",
    "standard_errors",
]
