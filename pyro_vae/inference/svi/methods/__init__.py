"""Ways to fit a pair other than by noisy gradients, in one table: `METHODS`."""

from pyro_vae.inference.svi.methods.registry import (
    METHODS,
    FittingMethod,
    check_method,
    guide_for,
    loss_for,
    method_config,
    posterior_of,
    rule_for,
)
from pyro_vae.inference.svi.methods.rule import MethodRule

__all__ = [
    "METHODS",
    "FittingMethod",
    "MethodRule",
    "check_method",
    "guide_for",
    "loss_for",
    "method_config",
    "posterior_of",
    "rule_for",
]
