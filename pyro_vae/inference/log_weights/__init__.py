"""The one idea: log w = log p(x, z) - log q(z | x), `[particles, batch]`, and its tail."""

from pyro_vae.inference.log_weights.draw import (
    effective_sample_size,
    elbo,
    importance_bound,
    log_weights,
)
from pyro_vae.inference.log_weights.moments import weighted_columns
from pyro_vae.inference.log_weights.pareto import khat_threshold, pareto_khat

__all__ = [
    "effective_sample_size",
    "elbo",
    "importance_bound",
    "khat_threshold",
    "log_weights",
    "pareto_khat",
    "weighted_columns",
]
