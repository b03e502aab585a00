"""`posterior_quality`: can this posterior be trusted, per datum and in words."""

from pyro_vae.diagnostics.posterior.assess import Limits, judge
from pyro_vae.diagnostics.posterior.quality import khat_threshold, posterior_quality, worst_data
from pyro_vae.diagnostics.posterior.reference import HmcReference

__all__ = [
    "HmcReference",
    "Limits",
    "judge",
    "khat_threshold",
    "posterior_quality",
    "worst_data",
]
