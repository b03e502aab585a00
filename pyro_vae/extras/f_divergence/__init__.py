"""`fit_divergence`: generators trained by f-divergences, through critics."""

from pyro_vae.extras.f_divergence.fit_divergence import fit_divergence

__all__ = [
    "fit_divergence",
]
