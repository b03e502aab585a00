"""`posterior_quality`: can this posterior be trusted, per datum and in words."""

from pyro_vae.diagnostics.posterior.assess import Thresholds, assess
from pyro_vae.diagnostics.posterior.quality import khat_threshold, posterior_quality, worst_data
from pyro_vae.diagnostics.posterior.reference import HmcReference

__all__ = [
    "HmcReference",
    "Thresholds",
    "assess",
    "khat_threshold",
    "posterior_quality",
    "worst_data",
]
