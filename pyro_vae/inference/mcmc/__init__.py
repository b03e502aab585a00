"""`sample_posterior`: one HMC kernel, batched over chains and data; tempering and convergence."""

from pyro_vae.inference.mcmc.convergence import bulk_ess, mean_ess, split_rhat
from pyro_vae.inference.mcmc.hmc import (
    Chains,
    PosteriorSample,
    hmc_step,
    jittered,
    run_chains,
    sample_posterior,
)
from pyro_vae.inference.mcmc.tempered import Point, Tempered

__all__ = [
    "Chains",
    "Point",
    "PosteriorSample",
    "Tempered",
    "bulk_ess",
    "hmc_step",
    "jittered",
    "mean_ess",
    "run_chains",
    "sample_posterior",
    "split_rhat",
]
