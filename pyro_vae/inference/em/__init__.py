"""`fit_em`: EM and its relatives, each half step on the same bound."""

from pyro_vae.inference.em.fit_em import EMFit, fit_em

__all__ = [
    "EMFit",
    "fit_em",
]
