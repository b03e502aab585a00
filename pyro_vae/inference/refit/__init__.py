"""`refit_guide`: the best guide of a family for each datum by itself."""

from pyro_vae.inference.refit.refit_guide import (
    FAMILIES,
    RefittedGuide,
    inspect_refittable,
    paired_log_weights,
    refits,
)

__all__ = [
    "FAMILIES",
    "RefittedGuide",
    "inspect_refittable",
    "paired_log_weights",
    "refits",
]
