"""Estimators of bounds and their gradients: `bounds` has a row for each, the rest is around it.

================  ================================================================================
module            what it holds
================  ================================================================================
`bounds`          one small class a row: value and detached coefficients, each with its paper
`base`            what makes a loss of a row: theta, score and path terms of the log weights
`direct`          estimators that have no log-weight coefficients
`not_bounds`      what trains like a bound and bounds nothing: beta-ELBO, free bits, InfoVAE
`registry`        all of them by name, with their options
================  ================================================================================
"""

from pyro_vae.inference.estimators.base import (
    Objective,
    Terms,
    can_share,
    log_p_of,
    log_q_of,
    scale_of,
    sites_without_path,
)
from pyro_vae.inference.estimators.bounds import (
    CIWAE,
    MIWAE,
    PIWAE,
    VIMCO,
    AnalyticELBO,
    Coefficients,
    DReG,
    Estimator,
    ImportanceWeighted,
    LeaveOneOut,
    PathwiseELBO,
    Renyi,
    RenyiDReG,
    ReweightedWakeSleep,
    ScoreFunction,
    SleepPhi,
    StickingTheLanding,
    StraightThrough,
    WakeDReG,
    WakeSleep,
    estimator_names,
    make_estimator,
)
from pyro_vae.inference.estimators.not_bounds import (
    BetaELBO,
    FreeBits,
    InfoVAE,
    maximum_mean_discrepancy,
)
from pyro_vae.inference.estimators.registry import (
    bounds_nothing,
    loss_options,
    loss_text,
    make_objective,
    objective_names,
)

__all__ = [
    "CIWAE",
    "MIWAE",
    "PIWAE",
    "VIMCO",
    "AnalyticELBO",
    "BetaELBO",
    "Coefficients",
    "DReG",
    "Estimator",
    "FreeBits",
    "ImportanceWeighted",
    "InfoVAE",
    "LeaveOneOut",
    "Objective",
    "PathwiseELBO",
    "Renyi",
    "RenyiDReG",
    "ReweightedWakeSleep",
    "ScoreFunction",
    "SleepPhi",
    "StickingTheLanding",
    "StraightThrough",
    "Terms",
    "WakeDReG",
    "WakeSleep",
    "bounds_nothing",
    "can_share",
    "estimator_names",
    "log_p_of",
    "log_q_of",
    "loss_options",
    "loss_text",
    "make_estimator",
    "make_objective",
    "maximum_mean_discrepancy",
    "objective_names",
    "scale_of",
    "sites_without_path",
]
