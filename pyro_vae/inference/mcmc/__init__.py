"""`sample_posterior`: one HMC kernel, batched over chains and data; adaptation, convergence."""

from pyro_vae.inference.mcmc.adaptation import estimated_scale
from pyro_vae.inference.mcmc.chains import Chains, run_chains, sample_posterior, warm_up
from pyro_vae.inference.mcmc.convergence import bulk_ess, mean_ess, split_rhat
from pyro_vae.inference.mcmc.hmc import Scale, hmc_step, jittered, random_length
from pyro_vae.inference.mcmc.sample import PosteriorSample

__all__ = [
    "Chains",
    "PosteriorSample",
    "Scale",
    "bulk_ess",
    "estimated_scale",
    "hmc_step",
    "jittered",
    "mean_ess",
    "random_length",
    "run_chains",
    "sample_posterior",
    "split_rhat",
    "warm_up",
]
