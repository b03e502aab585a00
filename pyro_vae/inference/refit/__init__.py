"""`refit_guide`: the best guide of a family for each datum by itself."""

from pyro_vae.inference.refit.normals import (
    Normal,
    WeightedDraws,
    batch_and_match,
    match_moments,
    match_scores,
    weighted_normal,
)
from pyro_vae.inference.refit.refit_guide import (
    FAMILIES,
    RefittedGuide,
    inspect_refittable,
    paired_log_weights,
    refit_guide,
    refits,
)

__all__ = [
    "FAMILIES",
    "Normal",
    "RefittedGuide",
    "WeightedDraws",
    "batch_and_match",
    "inspect_refittable",
    "match_moments",
    "match_scores",
    "paired_log_weights",
    "refit_guide",
    "refits",
    "weighted_normal",
]
