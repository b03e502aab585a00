"""Reading the latent space: shortest paths, attribute vectors, units, codes, probes."""

from pyro_vae.extras.latents.codes import (
    code_activity,
    directional_sensitivity,
    local_tangents,
)
from pyro_vae.extras.latents.latent_space import (
    attribute_effect,
    attribute_vector,
    compression,
    kl_from_standard_normal,
    relative_error,
    traverse,
    unit_effects,
)
from pyro_vae.extras.latents.paths import Decoder, magnification, shortest_path
from pyro_vae.extras.latents.probes import FeatureSets, feature_quality

__all__ = [
    "Decoder",
    "FeatureSets",
    "attribute_effect",
    "attribute_vector",
    "code_activity",
    "compression",
    "directional_sensitivity",
    "feature_quality",
    "kl_from_standard_normal",
    "local_tangents",
    "magnification",
    "relative_error",
    "shortest_path",
    "traverse",
    "unit_effects",
]
