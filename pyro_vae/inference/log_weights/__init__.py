"""The one idea: log w = log p(x, z) - log q(z | x), `[particles, batch]`, and its tail."""

from pyro_vae.inference.log_weights.draw import (
    SplitLogWeights,
    effective_sample_size,
    elbo,
    importance_bound,
    log_weights,
    mean_error,
)
from pyro_vae.inference.log_weights.moments import weighted_columns
from pyro_vae.inference.log_weights.pareto import (
    BoundError,
    importance_bound_error,
    khat_threshold,
    pareto_khat,
    pareto_tail,
    smoothed_log_weights,
    tail_inflation,
)

__all__ = [
    "BoundError",
    "SplitLogWeights",
    "effective_sample_size",
    "elbo",
    "importance_bound",
    "importance_bound_error",
    "khat_threshold",
    "log_weights",
    "mean_error",
    "pareto_khat",
    "pareto_tail",
    "smoothed_log_weights",
    "tail_inflation",
    "weighted_columns",
]
