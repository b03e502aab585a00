"""`elbo_gap`: log p(x) - ELBO per datum, split into approximation and amortisation."""

from pyro_vae.diagnostics.gap.elbo_gap import elbo_gap
from pyro_vae.diagnostics.gap.generalization import GapOnBoth, gap_on_both
from pyro_vae.diagnostics.gap.surgery import elbo_surgery

__all__ = [
    "GapOnBoth",
    "elbo_gap",
    "elbo_surgery",
    "gap_on_both",
]
