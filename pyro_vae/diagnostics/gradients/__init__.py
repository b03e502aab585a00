"""`compare_estimators`: bias, variance and cost of gradients; which to train with."""

from pyro_vae.diagnostics.gradients.compare import compare_estimators, gradient_draws
from pyro_vae.diagnostics.gradients.enumeration import enumerated_bound
from pyro_vae.diagnostics.gradients.equal_time import (
    learning_curves,
    train_at_equal_cost,
    training_rows,
)
from pyro_vae.diagnostics.gradients.recommend import (
    estimator_rows,
    recommend_estimators,
    recommendation,
    slope_rows,
    snr_slopes,
)

__all__ = [
    "compare_estimators",
    "enumerated_bound",
    "estimator_rows",
    "gradient_draws",
    "learning_curves",
    "recommend_estimators",
    "recommendation",
    "slope_rows",
    "snr_slopes",
    "train_at_equal_cost",
    "training_rows",
]
